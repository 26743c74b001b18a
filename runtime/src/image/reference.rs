//! Image names as people write them, and their one normal form.
//!
//! `busybox` is `docker.io/library/busybox:latest`, as in every other tool (distribution
//! reference grammar).

use super::error::{ImageError, Result};
pub use oci_client::Reference;

/// Parses a name and completes registry, `library/` and tag. A digest wins over a tag.
///
/// # Errors
/// [`ImageError::InvalidName`] with the grammar's complaint.
pub fn parse(name: &str) -> Result<Reference> {
    let invalid = |reason: String| ImageError::InvalidName {
        name: name.to_owned(),
        reason,
    };
    if as_id(name).is_some() {
        return Err(invalid("an image id is not a name".to_owned()));
    }
    let parsed: Reference = name
        .parse()
        .map_err(|e: oci_client::ParseError| invalid(e.to_string()))?;
    Ok(parsed)
}

/// `registry/repository` without tag and digest.
pub fn repository(reference: &Reference) -> String {
    format!("{}/{}", reference.registry(), reference.repository())
}

/// `registry/repository:tag`, when it has a tag and no digest decides.
pub fn tag_name(reference: &Reference) -> Option<String> {
    match (reference.digest(), reference.tag()) {
        (None, Some(tag)) => Some(format!("{}:{tag}", repository(reference))),
        (Some(_), _) | (None, None) => None,
    }
}

/// `registry/repository@digest`.
pub fn digest_name(reference: &Reference, digest: &str) -> String {
    format!("{}@{digest}", repository(reference))
}

/// The 64 hex digits when `text` is a whole image id, with or without `sha256:`.
pub fn as_id(text: &str) -> Option<&str> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    (hex.len() == 64 && is_hex(hex)).then_some(hex)
}

/// Hex digits when `text` may be the beginning of an id.
pub fn as_id_prefix(text: &str) -> Option<&str> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    ((6..=64).contains(&hex.len()) && is_hex(hex)).then_some(hex)
}

/// Whether it is `sha256:` and 64 lower-case hex digits, the only digests we verify and hence
/// the only ones we take as file names.
pub fn is_sha256(digest: &str) -> bool {
    digest
        .strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && is_hex(hex))
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_docker_does() {
        for (given, expect) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.37", "docker.io/library/busybox:1.37"),
            ("foo/bar", "docker.io/foo/bar:latest"),
            ("localhost/bar:x", "localhost/bar:x"),
            ("10.0.0.1:5000/a/b/c", "10.0.0.1:5000/a/b/c:latest"),
            (
                "registry.k8s.io/pause:3.10.2",
                "registry.k8s.io/pause:3.10.2",
            ),
            ("index.docker.io/library/a", "docker.io/library/a:latest"),
        ] {
            assert_eq!(tag_name(&parse(given).unwrap()).unwrap(), expect);
        }
    }

    #[test]
    fn a_digest_wins_over_a_tag() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let r = parse(&format!("foo:1@{digest}")).unwrap();
        assert_eq!(tag_name(&r), None);
        assert_eq!(
            digest_name(&r, r.digest().unwrap()),
            format!("docker.io/library/foo@{digest}")
        );
    }

    #[test]
    fn wrong_names_are_refused_by_name() {
        for bad in ["", "FOO", "foo bar", "foo@sha256:12", ":x", &"a".repeat(64)] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }
}
