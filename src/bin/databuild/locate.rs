//! Which run is meant, and where it is.

use databuild_logs::{JobMetadata, JobRunId, RunQuery, UnixMicros};

use crate::failure::{Code, Failure};
use crate::printing::{command, note};
use crate::settings::Settings;
use crate::source::{Source, SourceError};

/// How many candidates of an ambiguous beginning are named.
const CANDIDATES: usize = 10;
/// How many runs a service gives at once: where most of them are passed over, few requests are to do.
const LARGEST_PAGE: usize = 1_000;

/// How a run is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RunName {
    /// The run that started last.
    Latest,
    /// Its id, or the beginning of it.
    Id(JobRunId),
}

impl RunName {
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        match text {
            "latest" => Ok(Self::Latest),
            _ => Ok(Self::Id(text.parse()?)),
        }
    }
}

/// A run and where it is.
pub(crate) struct Located {
    pub(crate) source: Source,
    pub(crate) id: JobRunId,
    /// `None` for a run that is waited for.
    pub(crate) started_at: Option<UnixMicros>,
}

impl Located {
    fn new(source: Source, run: JobMetadata) -> Self {
        Self { source, started_at: Some(run.started_at), id: run.spec.id }
    }
}

/// Finds a run: in the service if one answers and knows it, else in the folder; in a folder that was given by hand
/// first.
///
/// With `wait`, an id that nobody knows yet is taken as it is. Then the beginning of an id that somebody chose stands
/// for no run: `build-1` is waited for while there is a `build-10`.
pub(crate) async fn locate(settings: &Settings, name: &RunName, wait: bool) -> Result<Located, Failure> {
    if let Some(folder) = settings.given_folder().await?
        && settings.folder_comes_first()
        && let Some(found) = find(&folder, name, wait).await?.one(name)?
    {
        return Ok(Located::new(folder, found));
    }
    let (client, chosen) = settings.client()?;
    let service = Source::Service(client);
    let silence = match find(&service, name, wait).await {
        Ok(found) => match found.one(name)? {
            Some(found) => return Ok(Located::new(service, found)),
            None => None,
        },
        Err(error) if error.none_answers() => Some(error),
        Err(error) => return Err(error.into()),
    };
    let folder = settings.folder().await;
    if let Ok(Some(folder)) = &folder
        && let Some(found) = find(folder, name, wait).await?.one(name)?
    {
        if silence.is_some() && chosen {
            note(format_args!("{service} can't answer: reading {folder}"));
        }
        return Ok(Located::new(folder.clone(), found));
    }
    match (silence, folder, name) {
        (None, _, RunName::Id(id)) if wait => Ok(waiting(service, id)),
        (None, folder, _) => Err(unknown(name, Some(service), folder.ok().flatten())),
        (Some(_), Ok(Some(folder)), RunName::Id(id)) if wait && !chosen => Ok(waiting(folder, id)),
        (Some(_), Ok(folder @ Some(_)), _) if !chosen => {
            Err(unknown(name, None, folder).line(format_args!("{service} does not answer")))
        }
        (Some(silence), Ok(Some(folder)), _) => {
            Err(Failure::from(silence).line(format_args!("{folder} does not know the run either")))
        }
        (Some(silence), Ok(None), _) => {
            let dir = settings.log_dir()?.value;
            Err(Failure::from(silence).line(format_args!("the log folder {} does not exist", dir.display())))
        }
        (Some(silence), Err(folder), _) => Err(Failure::from(silence).line(folder.message())),
    }
}

/// What a source knows by a name.
enum Found {
    One(Box<JobMetadata>),
    /// The first few of them.
    Several(Vec<JobMetadata>),
    Nothing,
}

impl Found {
    /// The run, if it is one.
    fn one(self, name: &RunName) -> Result<Option<JobMetadata>, Failure> {
        match self {
            Self::One(run) => Ok(Some(*run)),
            Self::Nothing => Ok(None),
            Self::Several(runs) => Err(ambiguous(name, &runs)),
        }
    }
}

async fn find(source: &Source, name: &RunName, wait: bool) -> Result<Found, SourceError> {
    let mut query = RunQuery { limit: Some(1), ..RunQuery::default() };
    let (mut enough, only_generated) = (1, wait && matches!(name, RunName::Id(_)));
    if let RunName::Id(id) = name {
        match source.run(id).await {
            Ok(run) => return Ok(Found::One(Box::new(run))),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        if only_generated && !may_be_generated(id) {
            return Ok(Found::Nothing);
        }
        enough = CANDIDATES + 1;
        let limit = if only_generated { LARGEST_PAGE } else { enough };
        query = RunQuery { limit: Some(limit), id_prefix: Some(id.to_string()), ..query };
    }
    let (mut runs, mut cursor) = (Vec::new(), None);
    loop {
        let page = source.runs(&query, cursor.as_deref()).await?;
        runs.extend(page.runs.into_iter().filter(|run| !only_generated || run.id().is_generated()));
        cursor = page.next;
        if cursor.is_none() || runs.len() >= enough {
            break;
        }
    }
    Ok(match runs.len() {
        0 => Found::Nothing,
        1 => Found::One(Box::new(runs.remove(0))),
        _ => Found::Several(runs),
    })
}

/// Whether a generated id can begin so.
fn may_be_generated(beginning: &JobRunId) -> bool {
    let rest = "00000000-0000-7000-8000-000000000000".get(beginning.as_str().len()..).unwrap_or_default();
    format!("{beginning}{rest}").parse().is_ok_and(|id: JobRunId| id.is_generated())
}

fn waiting(source: Source, id: &JobRunId) -> Located {
    note(format_args!("waiting for run {id} to start in {source}"));
    Located { source, id: id.clone(), started_at: None }
}

fn unknown(name: &RunName, service: Option<Source>, folder: Option<Source>) -> Failure {
    let places: Vec<String> = [service, folder].iter().flatten().map(Source::to_string).collect();
    let places = places.join(" or ");
    let failure = match name {
        RunName::Latest => Failure::new(Code::NotFound, format_args!("there is no run in {places}")),
        RunName::Id(id) => Failure::new(Code::NotFound, format_args!("there is no run {id} in {places}")),
    };
    failure.hint("`databuild runs` lists them")
}

fn ambiguous(name: &RunName, runs: &[JobMetadata]) -> Failure {
    let RunName::Id(prefix) = name else { return unknown(name, None, None) };
    let what = format_args!("more than one run begins with {prefix}");
    let failure = runs.iter().take(CANDIDATES).fold(Failure::new(Code::Usage, what), |failure, run| {
        failure.line(format_args!("{}  {}", run.id(), command(run)))
    });
    if runs.len() > CANDIDATES { failure.line("… and more") } else { failure }
}
