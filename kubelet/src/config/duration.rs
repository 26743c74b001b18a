//! Go's durations, as KubeletConfiguration writes them: `300ms`, `1m30s`, `1.5h`.

use std::time::Duration;

/// Parses a Go duration (`time.ParseDuration`) that is not negative. None when it is not one.
pub fn parse(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total_ns: u128 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, next) = tail.split_at(unit_len);
        total_ns = total_ns.checked_add(scaled(number, unit_ns(unit)?)?)?;
        rest = next;
    }
    let ns = u64::try_from(total_ns).ok()?;
    // Go's durations are signed 64-bit nanoseconds.
    i64::try_from(ns).ok()?;
    Some(Duration::from_nanos(ns))
}

fn unit_ns(unit: &str) -> Option<u128> {
    match unit {
        "ns" => Some(1),
        "us" | "µs" | "μs" => Some(1_000),
        "ms" => Some(1_000_000),
        "s" => Some(1_000_000_000),
        "m" => Some(60_000_000_000),
        "h" => Some(3_600_000_000_000),
        _ => None,
    }
}

/// `number` (digits with at most one point) times `unit`, rounded down.
fn scaled(number: &str, unit: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let whole: u128 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let mut value = whole.checked_mul(unit)?;
    let mut weight = unit;
    for digit in fraction.bytes().take(20) {
        weight /= 10;
        value = value.checked_add(u128::from(digit - b'0') * weight)?;
    }
    Some(value)
}

/// Writes a duration as Go does (`2m0s`, `1.5s`, `0s`).
pub fn format(duration: Duration) -> String {
    let ns = duration.as_nanos();
    if ns == 0 {
        return "0s".to_owned();
    }
    let small = |unit: u128, name: &str| fraction(ns, unit) + name;
    if ns < 1_000 {
        return small(1, "ns");
    }
    if ns < 1_000_000 {
        return small(1_000, "µs");
    }
    if ns < 1_000_000_000 {
        return small(1_000_000, "ms");
    }
    let (hours, rest) = (ns / 3_600_000_000_000, ns % 3_600_000_000_000);
    let (minutes, rest) = (rest / 60_000_000_000, rest % 60_000_000_000);
    let seconds = fraction(rest, 1_000_000_000) + "s";
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, m) => format!("{m}m{seconds}"),
        (h, m) => format!("{h}h{m}m{seconds}"),
    }
}

fn fraction(ns: u128, unit: u128) -> String {
    let (whole, rest) = (ns / unit, ns % unit);
    if rest == 0 {
        return whole.to_string();
    }
    let digits = unit.ilog10() as usize;
    let rest = format!("{rest:0digits$}");
    format!("{whole}.{}", rest.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn go_durations_are_read() {
        let ms = |n| Some(Duration::from_millis(n));
        assert_eq!(parse("1m30s"), ms(90_000));
        assert_eq!(parse("1.5h"), ms(5_400_000));
        assert_eq!(parse("100ms"), ms(100));
        assert_eq!(parse(".5s"), ms(500));
        assert_eq!(parse("0"), ms(0));
        assert_eq!(parse("0s"), ms(0));
    }

    #[test]
    fn what_go_refuses_is_refused() {
        for text in [
            "",
            "5",
            "1d",
            "s",
            "1..5s",
            "-1s",
            "1m 30s",
            "300000h0m0.5x",
            "9999999999h",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn durations_are_written_as_go_writes_them() {
        let check = |ms, text: &str| assert_eq!(format(Duration::from_millis(ms)), text);
        check(120_000, "2m0s");
        check(90_500, "1m30.5s");
        check(14_400_000, "4h0m0s");
        check(100, "100ms");
        check(0, "0s");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(ns in 0u64..i64::MAX as u64) {
            let duration = Duration::from_nanos(ns);
            prop_assert_eq!(parse(&format(duration)), Some(duration));
        }

        #[test]
        fn no_text_is_too_much(text in "\\PC{0,20}") {
            let _ = parse(&text);
        }
    }
}
