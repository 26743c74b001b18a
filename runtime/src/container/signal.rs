//! Signal names as images and pods write them. Pure.

const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// First real-time signal of the C library (the kernel's first two are its own).
const RTMIN: i32 = 34;
/// Last real-time signal.
const RTMAX: i32 = 64;

/// The number of a signal written as `SIGTERM`, `term`, `15` or `SIGRTMIN+3`.
#[must_use]
pub(crate) fn number(text: &str) -> Option<i32> {
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Ok(number) = name.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return real_time(RTMIN, rest);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return real_time(RTMAX, rest);
    }
    let alias = match name {
        "IOT" => "ABRT",
        "CLD" => "CHLD",
        "POLL" => "IO",
        other => other,
    };
    let index = NAMES.iter().position(|n| *n == alias)?;
    i32::try_from(index + 1).ok()
}

fn real_time(base: i32, offset: &str) -> Option<i32> {
    let offset: i32 = if offset.is_empty() {
        0
    } else {
        offset.parse().ok()?
    };
    let number = base.checked_add(offset)?;
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn signals_are_understood_in_every_spelling() {
        for text in ["SIGTERM", "TERM", "sigterm", "15"] {
            assert_eq!(number(text), Some(15));
        }
        assert_eq!(number("SIGKILL"), Some(9));
        assert_eq!(number("SIGSYS"), Some(31));
        assert_eq!(number("SIGRTMIN+3"), Some(37));
        assert_eq!(number("RTMAX-1"), Some(63));
        for bad in ["", "SIG", "0", "65", "SIGNOPE", "RTMIN+99"] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }
}
