//! Errors in one line, for logs, events and messages.

use std::error::Error;

/// An error with its causes, from the outermost. Foreign errors often print their cause
/// themselves: what is there already is not said twice.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        #[source]
        cause: Option<Box<Self>>,
    }

    fn link(text: &'static str, cause: Option<Link>) -> Link {
        let cause = cause.map(Box::new);
        Link { text, cause }
    }

    #[test]
    fn every_cause_is_said_once() {
        let disk = link("no space", None);
        let outer = link("write a: no space", Some(disk));
        let whole = link("keep the record", Some(outer));
        assert_eq!(chain(&whole), "keep the record: write a: no space");
    }
}
