//! The client as a library.

use databuild_logs::{
    Client, ClientEnd, ClientError, ClientEvent, LineNumber, LogQuery, RunQuery, Stream, View,
};
use futures_util::{StreamExt, TryStreamExt};

use super::{Setup, exited, numbers, run_id};

#[tokio::test]
async fn runs_are_listed_page_by_page() {
    let setup = Setup::new().await;
    for id in ["a", "b", "c"] {
        setup.start(id);
    }
    let client = client(&setup);
    let query = RunQuery { limit: Some(2), ..RunQuery::default() };
    let first = client.runs(&query, None).await.unwrap();
    let last = client.runs(&query, first.next.as_deref()).await.unwrap();
    let ids: Vec<_> = first.runs.iter().chain(&last.runs).map(|run| run.id().as_str()).collect();
    assert_eq!((ids.as_slice(), last.next), (&["c", "b", "a"][..], None));
    assert!(
        matches!(client.run(&run_id("x")).await, Err(ClientError::NotFound { id, .. }) if id.as_str() == "x")
    );
}

#[tokio::test]
async fn a_read_gives_every_line_with_its_place_and_then_the_end() {
    let setup = Setup::new().await;
    setup.out("r", numbers(3));
    setup.err("r", "e\n");
    let read: Vec<ClientEvent> =
        client(&setup).read(&run_id("r"), LogQuery::new(View::All)).try_collect().await.unwrap();
    let mut places = Vec::new();
    for event in &read {
        if let ClientEvent::Lines(batch) = event {
            places.extend(batch.lines().map(|line| (batch.stream, line.number.0, line.position.0)));
        }
    }
    use Stream::{Stderr, Stdout};
    assert_eq!(places, [(Stdout, 1, 1), (Stdout, 2, 2), (Stdout, 3, 3), (Stderr, 1, 4)]);
    let end = ClientEnd::Running { next: LineNumber(4) };
    assert!(matches!(read.last(), Some(ClientEvent::End(last)) if *last == end), "{read:?}");
}

#[tokio::test]
async fn the_first_error_is_the_only_item() {
    let setup = Setup::new().await;
    let mut read = client(&setup).read(&run_id("r"), LogQuery::new(View::STDOUT));
    assert!(matches!(read.next().await, Some(Err(ClientError::NotFound { .. }))));
    assert!(read.next().await.is_none());
}

#[tokio::test]
async fn raw_bytes_come_as_they_are() {
    let setup = Setup::new().await;
    setup.out("r", b"a\n\xff\nb");
    setup.finish("r", exited(0));
    let raw = |since, lines| {
        let client = client(&setup);
        async move {
            let pieces = client.raw(&run_id("r"), Stream::Stdout, since, lines).await.unwrap();
            pieces.try_collect::<Vec<_>>().await.unwrap().concat()
        }
    };
    assert_eq!(raw(None, None).await, b"a\n\xff\nb");
    assert_eq!(raw(Some(LineNumber(1)), Some(1)).await, b"\xff\n");
    assert_eq!(raw(None, Some(1)).await, b"b");
    let missing = client(&setup).raw(&run_id("x"), Stream::Stdout, None, None).await;
    assert!(matches!(missing.err(), Some(ClientError::NotFound { .. })));
}

fn client(setup: &Setup) -> Client {
    Client::new(&format!("http://{}", setup.server.address), None).unwrap()
}
