//! Expansion of `$(NAME)` in commands, arguments, environment values and subPathExpr.
//!
//! `$(NAME)` becomes the value; a name nobody knows stays as written; `$$` is a plain `$`, so
//! `$$(NAME)` is the text `$(NAME)`. Everything else is left alone.

use std::borrow::Cow;
use std::collections::BTreeSet;

/// Expands `input`; `lookup` gives the value of a name, or nothing to leave the reference.
pub fn expand<'v>(input: &str, lookup: impl Fn(&str) -> Option<Cow<'v, str>>) -> String {
    let mut out = String::with_capacity(input.len());
    let mut rest = input;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|s| s.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// Expands `input` with the final environment.
pub fn expand_env(input: &str, env: &[(String, String)]) -> String {
    expand(input, |name| find(env, name).map(Cow::Borrowed))
}

/// Expands a subPathExpr: every name must have a value that is not empty.
///
/// # Errors
/// The stock message with the missing names, sorted.
pub fn expand_sub_path(input: &str, env: &[(String, String)]) -> Result<String, String> {
    let missing = std::cell::RefCell::new(BTreeSet::new());
    let expanded = expand(input, |name| {
        let value = find(env, name).unwrap_or_default();
        if value.is_empty() {
            missing.borrow_mut().insert(name.to_owned());
        }
        Some(Cow::Borrowed(value))
    });
    let missing = missing.into_inner();
    if missing.is_empty() {
        return Ok(expanded);
    }
    let names: Vec<String> = missing.into_iter().collect();
    Err(format!("missing value for {}", names.join(", ")))
}

fn find<'e>(env: &'e [(String, String)], name: &str) -> Option<&'e str> {
    env.iter()
        .rev()
        .find(|(n, _)| n == name)
        .map(|(_, v)| v.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn env() -> Vec<(String, String)> {
        [("A", "1"), ("B", "$(A)"), ("EMPTY", "")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .to_vec()
    }

    #[test]
    fn references_escapes_and_literals_expand_as_stock_does() {
        for (input, want) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$(B)", "$(A)"),
            ("$(EMPTY)", ""),
            ("$(NOPE)", "$(NOPE)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$$$(A)", "$$(A)"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$(A$(A)", "$(A$(A)"),
            ("$", "$"),
            ("$$", "$"),
            ("a$", "a$"),
            ("$()", "$()"),
            ("$((A))", "$((A))"),
            ("é$é", "é$é"),
            ("", ""),
        ] {
            assert_eq!(expand_env(input, &env()), want, "{input}");
        }
    }

    #[test]
    fn a_sub_path_expression_needs_every_value() {
        assert_eq!(expand_sub_path("d/$(A)", &env()).unwrap(), "d/1");
        assert_eq!(
            expand_sub_path("$(Z)/$(EMPTY)/$(A)", &env()).unwrap_err(),
            "missing value for EMPTY, Z"
        );
    }

    proptest! {
        #[test]
        fn text_without_a_dollar_is_left_alone(input in "[^$]{0,60}") {
            prop_assert_eq!(expand_env(&input, &env()), input);
        }

        #[test]
        fn doubling_every_dollar_writes_any_text_literally(input in "\\PC{0,60}") {
            let escaped = input.replace('$', "$$");
            prop_assert_eq!(expand_env(&escaped, &env()), input);
        }

        #[test]
        fn with_no_names_known_only_doubled_dollars_change(input in "[$()A-C]{0,40}") {
            prop_assert!(expand_env(&input, &[]).len() <= input.len());
        }
    }
}
