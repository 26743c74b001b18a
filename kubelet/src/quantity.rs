//! Kubernetes quantities (`500m`, `1.5Gi`, `1e3`), exact to the nano unit.
//!
//! The rules are those of apimachinery's `resource.Quantity`: what is finer than a nano unit is
//! rounded away from zero, what exceeds 2⁶³−1 units is capped, and the canonical form keeps the
//! suffix family the text was written in. Pure: no IO, no floats.

use std::cmp::Ordering;
use std::fmt;

/// Nano units in one unit.
const NANO: i128 = 1_000_000_000;
/// Cap of the magnitude, in nano units.
const MAX_NANOS: i128 = i64::MAX as i128 * NANO;
/// Fractional digits that are kept exactly; further ones only decide the rounding.
const MAX_FRACTION_DIGITS: u32 = 20;

/// The suffix family of the canonical form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `n u m k M G T P E`.
    DecimalSi,
    /// `Ki Mi Gi Ti Pi Ei`.
    BinarySi,
    /// `e3`, `e-6`.
    DecimalExponent,
}

/// A text that is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("quantity {text:?} is not valid: {why}")]
pub struct QuantityError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// An amount of something.
#[derive(Debug, Clone, Copy)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

/// Value of a suffix.
enum Scale {
    Ten(i32),
    Two(u32),
}

impl Quantity {
    /// Zero, in decimal form.
    pub const ZERO: Self = Self {
        nanos: 0,
        format: Format::DecimalSi,
    };

    /// So many whole units.
    pub fn from_units(units: i64, format: Format) -> Self {
        Self {
            nanos: i128::from(units) * NANO,
            format,
        }
    }

    /// So many thousandths, in decimal form.
    pub fn from_milli(milli: i64) -> Self {
        Self {
            nanos: (i128::from(milli) * (NANO / 1000)).clamp(-MAX_NANOS, MAX_NANOS),
            format: Format::DecimalSi,
        }
    }

    /// Reads a quantity.
    ///
    /// # Errors
    /// [`QuantityError`] names the text and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let fail = |why| QuantityError {
            text: text.to_owned(),
            why,
        };
        let (negative, rest) = match text.as_bytes().first() {
            None => return Err(fail("it is empty")),
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            Some(_) => (false, text),
        };
        let digits_end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(digits_end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if fraction.contains('.') {
            return Err(fail("it has more than one decimal point"));
        }
        if whole.is_empty() && fraction.is_empty() {
            return Err(fail("it has no digits"));
        }
        let (scale, format) = read_suffix(suffix).ok_or_else(|| fail("unknown suffix"))?;
        let nanos = match scale {
            Scale::Ten(exponent) => decimal_nanos(whole, fraction, exponent),
            Scale::Two(shift) => binary_nanos(whole, fraction, shift),
        }
        .min(MAX_NANOS);
        // A binary amount below one has no binary form.
        let format = if format == Format::BinarySi && nanos > 0 && nanos < NANO {
            Format::DecimalSi
        } else {
            format
        };
        Ok(Self {
            nanos: if negative { -nanos } else { nanos },
            format,
        })
    }

    /// Whole units, rounded away from zero.
    pub fn value(&self) -> i64 {
        self.scaled(NANO)
    }

    /// Thousandths, rounded away from zero.
    pub fn milli_value(&self) -> i64 {
        self.scaled(NANO / 1000)
    }

    /// Whether it is zero.
    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    /// Below zero.
    pub fn is_negative(&self) -> bool {
        self.nanos < 0
    }

    /// The sum, in the form of `self` unless that is zero; capped.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            nanos: (self.nanos + other.nanos).clamp(-MAX_NANOS, MAX_NANOS),
            format: if self.is_zero() {
                other.format
            } else {
                self.format
            },
        }
    }

    /// The difference, in the form of `self`; capped.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        Self {
            nanos: (self.nanos - other.nanos).clamp(-MAX_NANOS, MAX_NANOS),
            format: self.format,
        }
    }

    /// How it is written.
    pub fn format(&self) -> Format {
        self.format
    }

    fn scaled(&self, unit: i128) -> i64 {
        let magnitude = ceil_div(self.nanos.abs(), unit);
        let magnitude = i64::try_from(magnitude).unwrap_or(i64::MAX);
        if self.nanos < 0 {
            -magnitude
        } else {
            magnitude
        }
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl fmt::Display for Quantity {
    /// The canonical form: no leading or trailing zeros, the largest suffix without a fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        let whole = self.nanos % NANO == 0;
        let below_ki = self.nanos.abs() < 1024 * NANO;
        match self.format {
            Format::BinarySi if whole && !below_ki => {
                let mut units = self.nanos / NANO;
                let mut step = 0;
                while units % 1024 == 0 && step < 6 {
                    units /= 1024;
                    step += 1;
                }
                write!(
                    f,
                    "{units}{}",
                    ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][step]
                )
            }
            Format::BinarySi | Format::DecimalSi => {
                let (number, exponent) = self.decimal_parts();
                match exponent {
                    -9 => write!(f, "{number}n"),
                    -6 => write!(f, "{number}u"),
                    -3 => write!(f, "{number}m"),
                    0 => write!(f, "{number}"),
                    3 => write!(f, "{number}k"),
                    6 => write!(f, "{number}M"),
                    9 => write!(f, "{number}G"),
                    12 => write!(f, "{number}T"),
                    15 => write!(f, "{number}P"),
                    _ => write!(f, "{number}E"),
                }
            }
            Format::DecimalExponent => {
                let (number, exponent) = self.decimal_parts();
                if exponent == 0 {
                    write!(f, "{number}")
                } else {
                    write!(f, "{number}e{exponent}")
                }
            }
        }
    }
}

impl Quantity {
    /// The number and the power of ten, a multiple of three, at most 18.
    fn decimal_parts(&self) -> (i128, i32) {
        let mut number = self.nanos;
        let mut exponent = -9;
        while number % 1000 == 0 && exponent < 18 {
            number /= 1000;
            exponent += 3;
        }
        (number, exponent)
    }
}

/// The scale and family a suffix stands for.
fn read_suffix(suffix: &str) -> Option<(Scale, Format)> {
    let si = |exponent| Some((Scale::Ten(exponent), Format::DecimalSi));
    let binary = |shift| Some((Scale::Two(shift), Format::BinarySi));
    match suffix {
        "" => si(0),
        "n" => si(-9),
        "u" => si(-6),
        "m" => si(-3),
        "k" => si(3),
        "M" => si(6),
        "G" => si(9),
        "T" => si(12),
        "P" => si(15),
        "E" => si(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let digits = suffix.strip_prefix(['e', 'E'])?;
            let exponent: i32 = digits.parse().ok()?;
            Some((Scale::Ten(exponent), Format::DecimalExponent))
        }
    }
}

/// The value of at most 38 decimal digits; saturates far above the cap.
fn digits(text: &str) -> i128 {
    text.bytes().fold(0_i128, |sum, digit| {
        sum.saturating_mul(10)
            .saturating_add(i128::from(digit - b'0'))
    })
}

/// The kept digits of a fraction, their count, and whether something not zero was cut off.
fn fraction_parts(fraction: &str) -> (i128, u32, bool) {
    let fraction = fraction.trim_end_matches('0');
    let kept = fraction.len().min(MAX_FRACTION_DIGITS as usize);
    (
        digits(&fraction[..kept]),
        kept as u32,
        fraction.len() > kept,
    )
}

/// 10^exponent, saturating.
fn ten(exponent: u32) -> i128 {
    10_i128.saturating_pow(exponent)
}

/// `a / b` rounded up, for values that are not negative.
fn ceil_div(a: i128, b: i128) -> i128 {
    a / b + i128::from(a % b != 0)
}

/// Nano units of `whole.fraction × 10^exponent`, rounded up, saturating.
fn decimal_nanos(whole: &str, fraction: &str, exponent: i32) -> i128 {
    let (part, count, cut) = fraction_parts(fraction);
    let whole = digits(whole);
    let shift = exponent.saturating_add(9);
    if shift < 0 {
        let unit = ten(shift.unsigned_abs());
        let rest = whole % unit != 0 || part != 0 || cut;
        return whole / unit + i128::from(rest);
    }
    let shift = shift.unsigned_abs();
    // Without digits there is nothing to scale, however large the power is.
    let high = if whole == 0 {
        0
    } else {
        whole.saturating_mul(ten(shift))
    };
    let low = if part == 0 {
        0
    } else if shift >= count {
        part.saturating_mul(ten(shift - count))
    } else {
        let unit = ten(count - shift);
        part / unit + i128::from(part % unit != 0 || cut)
    };
    let low = if cut && shift >= count && part == 0 {
        1
    } else {
        low
    };
    high.saturating_add(low)
}

/// Nano units of `whole.fraction × 2^shift`, rounded up, saturating.
fn binary_nanos(whole: &str, fraction: &str, shift: u32) -> i128 {
    let (part, count, cut) = fraction_parts(fraction);
    let high = digits(whole)
        .saturating_mul(1 << shift)
        .saturating_mul(NANO);
    let low = if count <= 9 {
        // part < 10^count, so this stays below 2^60 × 10^9.
        (part * ten(9 - count)) << shift
    } else {
        let unit = ten(count - 9);
        let scaled = part << shift;
        scaled / unit + i128::from(scaled % unit != 0 || cut)
    };
    high.saturating_add(low)
}

impl TryFrom<&k8s_openapi::apimachinery::pkg::api::resource::Quantity> for Quantity {
    type Error = QuantityError;

    fn try_from(
        text: &k8s_openapi::apimachinery::pkg::api::resource::Quantity,
    ) -> Result<Self, Self::Error> {
        Self::parse(&text.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn canonical(text: &str) -> String {
        Quantity::parse(text).unwrap().to_string()
    }

    #[test]
    fn canonical_forms_are_those_of_apimachinery() {
        for (text, want) in [
            ("0", "0"),
            ("0Ki", "0"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("0.5", "500m"),
            ("1024", "1024"),
            ("1024Ki", "1Mi"),
            ("1000Ki", "1000Ki"),
            ("0.5Gi", "512Mi"),
            ("1.5Gi", "1536Mi"),
            ("1.1Gi", "1181116006400m"),
            ("512Ki", "512Ki"),
            ("1Ki", "1Ki"),
            ("0.5Ki", "512"),
            ("100k", "100k"),
            ("1e3", "1e3"),
            ("1E3", "1e3"),
            ("1E", "1E"),
            ("0.0000000001", "1n"),
            ("-0.0000000001", "-1n"),
            ("+1", "1"),
            (".5", "500m"),
            ("1.", "1"),
            ("12e-4", "1200e-6"),
            ("100000000000000000000", "9223372036854775807"),
            (
                "99999999999999999999999999999999999999999Ei",
                "9223372036854775807",
            ),
        ] {
            assert_eq!(canonical(text), want, "{text}");
        }
    }

    #[test]
    fn values_round_away_from_zero() {
        let q = |text| Quantity::parse(text).unwrap();
        assert_eq!(q("1500m").value(), 2);
        assert_eq!(q("-1500m").value(), -2);
        assert_eq!(q("1n").milli_value(), 1);
        assert_eq!(q("250m").milli_value(), 250);
        assert_eq!(q("64Mi").value(), 64 << 20);
        assert_eq!(q("1Gi").milli_value(), 1000 << 30);
        assert_eq!(q("8Ei").milli_value(), i64::MAX);
    }

    #[test]
    fn what_is_no_quantity_is_refused_by_name() {
        for text in [
            "", "-", "Mi", "1.2.3", "1mi", "1 Gi", "1KB", "1e", "0x10", "é", "1é",
        ] {
            let error = Quantity::parse(text).unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{text}");
        }
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_a_fixed_point(
            negative: bool, whole in 0_u64..1 << 62, fraction in "[0-9]{0,24}",
            suffix in prop::sample::select(vec![
                "", "n", "u", "m", "k", "M", "Ki", "Mi", "Gi", "e3", "e-3", "E6",
            ]),
        ) {
            let sign = if negative { "-" } else { "" };
            let text = format!("{sign}{whole}.{fraction}{suffix}");
            let first = Quantity::parse(&text).unwrap();
            let again = Quantity::parse(&first.to_string()).unwrap();
            prop_assert_eq!(first, again);
            prop_assert_eq!(first.to_string(), again.to_string());
        }

        #[test]
        fn any_text_is_read_or_refused_without_a_panic(text in "\\PC{0,40}") {
            let _ = Quantity::parse(&text);
        }

        #[test]
        fn numbers_of_any_length_are_read(
            whole in "[0-9]{1,60}", fraction in "[0-9]{0,60}",
            suffix in prop::sample::select(vec!["", "n", "E", "Ei", "Ki", "e40", "e-40", "e2000000000"]),
        ) {
            let text = format!("{whole}.{fraction}{suffix}");
            let value = Quantity::parse(&text).unwrap();
            prop_assert!(!value.is_negative());
            let _ = (value.value(), value.milli_value(), value.to_string());
        }

        #[test]
        fn order_is_that_of_milli_units(a in -1_000_000_i64..1_000_000, b in -1_000_000_i64..1_000_000) {
            let (x, y) = (Quantity::from_milli(a), Quantity::from_milli(b));
            prop_assert_eq!(x.cmp(&y), a.cmp(&b));
            prop_assert_eq!(x.plus(&y).milli_value(), a + b);
            prop_assert_eq!(Quantity::parse(&x.to_string()).unwrap(), x);
        }
    }
}
