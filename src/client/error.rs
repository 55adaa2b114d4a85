//! What can go wrong between a client and its service, by what it means to the caller.

use std::error::Error;

use crate::run::{JobRunId, Tombstone};

/// Why a request to a service failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address or the token can't be used for any request.
    #[error("{given:?} is not the address of a service: {reason}")]
    BadAddress {
        /// What was given.
        given: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The token holds characters that no header may hold.
    #[error("the token can't be sent: it holds characters that are not allowed in a header")]
    BadToken,
    /// Nothing answers there, or the connection broke and could not be made again.
    #[error("no service answers at {url}")]
    Unreachable {
        /// The service's address.
        url: String,
        /// What the network said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Something answers, but it is no log service.
    #[error("what answers at {url} is not a databuild log service: {what}")]
    NotOurs {
        /// The address asked.
        url: String,
        /// What gave it away.
        what: String,
    },
    /// The service wants a token, or another one.
    #[error("the service at {url} refuses the token, or wants one")]
    Unauthorized {
        /// The service's address.
        url: String,
    },
    /// The service knows no run with this id.
    #[error("the service at {url} knows no run {id}")]
    NotFound {
        /// The service's address.
        url: String,
        /// The run asked for.
        id: JobRunId,
    },
    /// The run was evicted; what is left of it says when and why.
    #[error("run {} was evicted at {}: {}", .0.id, .0.evicted_at, .0.reason)]
    Evicted(Box<Tombstone>),
    /// The service can't use a parameter.
    #[error("the service refuses the request: {detail}")]
    BadParameter {
        /// The parameter to blame, if the service named one.
        parameter: Option<String>,
        /// What would be right, in the service's words.
        detail: String,
    },
    /// The service does not do it, and trying again changes nothing by itself.
    #[error("the service refuses the request: {detail}")]
    Refused {
        /// Why, in the service's words.
        detail: String,
    },
    /// The service tried, and failed: a file is damaged or can't be read. Trying again changes nothing by itself.
    #[error("the service at {url} failed: {detail}")]
    Failed {
        /// The service's address.
        url: String,
        /// Why, in the service's words.
        detail: String,
    },
    /// The service can't answer at the moment.
    #[error("the service at {url} can't answer at the moment (HTTP {status}): {detail}")]
    Unavailable {
        /// The service's address.
        url: String,
        /// The HTTP status.
        status: u16,
        /// Why, in the service's words.
        detail: String,
    },
    /// The service said something that this client does not understand.
    #[error("the service at {url} and this client do not understand each other: {what}")]
    Protocol {
        /// The service's address.
        url: String,
        /// What was not understood.
        what: String,
    },
}

impl ClientError {
    /// Whether the same request may succeed a moment later.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Unavailable { .. })
    }
}
