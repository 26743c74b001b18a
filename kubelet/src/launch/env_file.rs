//! Environment files (`fileKeyRef`, KEP-5307): lines `NAME='value'`, a part of a shell's words.
//! Pure over the file's bytes.

/// The value of `key` in a file; empty when it is not there or has no value.
///
/// Values stand in single quotes and may span lines; nothing in them is special. Lines that are
/// empty or begin with `#` are skipped. A value that is parted from its `=` by a blank is empty,
/// as in a shell.
///
/// # Errors
/// What is no such line, with its number; lines behind the key are not looked at.
pub fn value(file: &str, key: &str) -> Result<String, String> {
    let mut lines = Lines {
        rest: file,
        number: 0,
    };
    while let Some(line) = lines.next() {
        let line = line.trim_start_matches([' ', '\t']);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let refuse = |number: usize, why: &str| {
            Err(format!(
                "invalid environment variable format at line {number}: {why}"
            ))
        };
        let Some((name, after)) = line.split_once('=') else {
            return refuse(lines.number, "missing '='");
        };
        if name.trim_end_matches([' ', '\t']).is_empty() {
            return refuse(lines.number, "empty variable name");
        }
        if name.ends_with([' ', '\t']) {
            return refuse(lines.number, "whitespace before '=' is not allowed");
        }
        let found = name == key;
        if after.starts_with([' ', '\t']) {
            if found {
                return Ok(String::new());
            }
            continue;
        }
        let Some(quoted) = after.strip_prefix('\'') else {
            return refuse(lines.number, "value must be enclosed in single quotes");
        };
        let (value, behind) = lines.quoted(quoted)?;
        let behind = behind.trim_start_matches([' ', '\t']);
        if !behind.is_empty() && !behind.starts_with('#') {
            return refuse(lines.number, "unexpected content after closing quote");
        }
        if found {
            return Ok(value);
        }
    }
    Ok(String::new())
}

struct Lines<'a> {
    rest: &'a str,
    /// Of the line given last, from 1.
    number: usize,
}

impl<'a> Lines<'a> {
    fn next(&mut self) -> Option<&'a str> {
        if self.rest.is_empty() {
            return None;
        }
        let (line, rest) = self.rest.split_once('\n').unwrap_or((self.rest, ""));
        self.rest = rest;
        self.number += 1;
        Some(line.strip_suffix('\r').unwrap_or(line))
    }

    /// What is quoted from here on, and the rest of the line where that ends.
    fn quoted(&mut self, first: &'a str) -> Result<(String, &'a str), String> {
        let began = self.number;
        let mut value = String::new();
        let mut line = first;
        loop {
            if let Some((end, behind)) = line.split_once('\'') {
                value.push_str(end);
                return Ok((value, behind));
            }
            value.push_str(line);
            value.push('\n');
            line = self.next().ok_or_else(|| {
                format!(
                    "invalid environment variable format starting at line {began}: unclosed \
                     single quote"
                )
            })?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_and_may_span_lines() {
        let file =
            "# note\n\n  A='1'\nB='two words # $x \\' # comment\nC='a\nb\n'\nD= 'no'\nE=''\n";
        for (key, want) in [
            ("A", "1"),
            ("B", "two words # $x \\"),
            ("C", "a\nb\n"),
            ("D", ""),
            ("E", ""),
            ("F", ""),
        ] {
            assert_eq!(value(file, key).as_deref(), Ok(want), "{key}");
        }
    }

    #[test]
    fn what_is_no_such_line_is_refused_by_number() {
        for (file, want) in [
            ("A='1'\nB", "at line 2: missing '='"),
            ("A ='1'", "at line 1: whitespace before '=' is not allowed"),
            ("=' '", "at line 1: empty variable name"),
            ("A=1", "at line 1: value must be enclosed in single quotes"),
            (
                "A='1' x",
                "at line 1: unexpected content after closing quote",
            ),
            ("\nA='1\n2", "starting at line 2: unclosed single quote"),
        ] {
            let error = value(file, "Z").unwrap_err();
            assert!(error.ends_with(want), "{error}");
        }
        assert_eq!(value("A='1'\nbroken", "A").as_deref(), Ok("1"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_without_a_crash(file: String, key: String) {
            let _ = value(&file, &key);
        }

        #[test]
        fn what_is_quoted_comes_back(content in "[^'\r]*") {
            let file = format!("X='y'\nK='{content}'\n");
            proptest::prop_assert_eq!(value(&file, "K"), Ok(content));
        }
    }
}
