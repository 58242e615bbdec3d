//! Kubernetes' resource quantities: `500m`, `1.5`, `128Mi`, `1e3`
//! (k8s.io/apimachinery, `resource.Quantity`: decimal SI, binary SI and decimal exponent suffixes).

use std::str::FromStr;

use thiserror::Error;

/// An amount, exact to a thousandth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity {
    milli: u128,
}

/// Why a text is no quantity.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum QuantityError {
    /// Not of the form at all.
    #[error("{0:?} is no quantity; write for example 500m, 2, 128Mi")]
    Malformed(String),
    /// Below zero.
    #[error("{0:?} is negative")]
    Negative(String),
    /// More than 2^64 units.
    #[error("{0:?} is too large")]
    TooLarge(String),
}

impl Quantity {
    /// In thousandths, rounded up; the unit that CPUs are counted in.
    ///
    /// # Panics
    /// Never: parsing keeps it below 2^64.
    #[must_use]
    pub fn milli(self) -> u64 {
        u64::try_from(self.milli).unwrap_or(u64::MAX)
    }

    /// In whole units, rounded up as Kubernetes does; the unit that memory is counted in.
    #[must_use]
    pub fn units(self) -> u64 {
        u64::try_from(self.milli.div_ceil(1000)).unwrap_or(u64::MAX)
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let malformed = || QuantityError::Malformed(text.to_owned());
        if text.starts_with('-') {
            return Err(QuantityError::Negative(text.to_owned()));
        }
        let number = text.strip_prefix('+').unwrap_or(text);
        let end = number
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(number.len());
        let (digits, suffix) = number.split_at(end);
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || digits.len() > 30 {
            return Err(malformed());
        }
        let scale = Scale::parse(suffix).ok_or_else(malformed)?;
        let mantissa: u128 = format!("0{whole}{fraction}").parse().map_err(|_| malformed())?;
        let fraction_digits = u32::try_from(fraction.len()).map_err(|_| malformed())?;
        scale
            .thousandths(mantissa, fraction_digits)
            .filter(|milli| *milli <= u128::from(u64::MAX) * 1000)
            .map(|milli| Self { milli })
            .ok_or_else(|| QuantityError::TooLarge(text.to_owned()))
    }
}

/// What a suffix multiplies by.
enum Scale {
    /// A power of ten; `m` is -3.
    Decimal(i32),
    /// A power of two.
    Binary(u32),
}

impl Scale {
    fn parse(suffix: &str) -> Option<Self> {
        Some(match suffix {
            "n" => Self::Decimal(-9),
            "u" => Self::Decimal(-6),
            "m" => Self::Decimal(-3),
            "" => Self::Decimal(0),
            "k" => Self::Decimal(3),
            "M" => Self::Decimal(6),
            "G" => Self::Decimal(9),
            "T" => Self::Decimal(12),
            "P" => Self::Decimal(15),
            "E" => Self::Decimal(18),
            "Ki" => Self::Binary(10),
            "Mi" => Self::Binary(20),
            "Gi" => Self::Binary(30),
            "Ti" => Self::Binary(40),
            "Pi" => Self::Binary(50),
            "Ei" => Self::Binary(60),
            _ => {
                let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
                if !(-30..=30).contains(&exponent) {
                    return None;
                }
                Self::Decimal(exponent)
            }
        })
    }

    /// `mantissa / 10^fraction_digits * self * 1000`, rounded up; `None` where it does not fit.
    fn thousandths(&self, mantissa: u128, fraction_digits: u32) -> Option<u128> {
        let (factor, exponent) = match self {
            Self::Binary(bits) => (1u128 << bits, 3 - i32::try_from(fraction_digits).ok()?),
            Self::Decimal(power) => (1, power + 3 - i32::try_from(fraction_digits).ok()?),
        };
        let scaled = mantissa.checked_mul(factor)?;
        let ten = 10u128.checked_pow(exponent.unsigned_abs());
        match (exponent >= 0, ten) {
            (true, Some(ten)) => scaled.checked_mul(ten),
            (true, None) if scaled == 0 => Some(0),
            (true, None) => None,
            (false, Some(ten)) => Some(scaled.div_ceil(ten)),
            (false, None) => Some(u128::from(scaled > 0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milli(text: &str) -> u64 {
        text.parse::<Quantity>().unwrap().milli()
    }

    #[test]
    fn every_suffix_has_its_factor() {
        assert_eq!(milli("500m"), 500);
        assert_eq!(milli("1.5"), 1500);
        assert_eq!(milli(".5"), 500);
        assert_eq!(milli("2."), 2000);
        assert_eq!(milli("1e3"), 1_000_000);
        assert_eq!("1E".parse::<Quantity>().unwrap().units(), 1_000_000_000_000_000_000);
        assert_eq!("128Mi".parse::<Quantity>().unwrap().units(), 128 << 20);
        assert_eq!("1.5Gi".parse::<Quantity>().unwrap().units(), 3 << 29);
        assert_eq!("1k".parse::<Quantity>().unwrap().units(), 1000);
    }

    #[test]
    fn fractions_below_the_unit_round_up() {
        assert_eq!(milli("1n"), 1);
        assert_eq!("1m".parse::<Quantity>().unwrap().units(), 1);
        assert_eq!(milli("0"), 0);
        assert_eq!(milli("0e30"), 0);
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in ["", "Mi", ".", "1.2.3", "1 Gi", "1KiB", "0x10", "1e99", "1ee3", "١"] {
            assert_eq!(
                text.parse::<Quantity>(),
                Err(QuantityError::Malformed(text.to_owned())),
                "{text}"
            );
        }
        assert_eq!("-1".parse::<Quantity>(), Err(QuantityError::Negative("-1".to_owned())));
        assert_eq!(
            "100000Ei".parse::<Quantity>(),
            Err(QuantityError::TooLarge("100000Ei".to_owned()))
        );
    }
}
