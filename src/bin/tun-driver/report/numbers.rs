//! Numbers as people read them: three digits, no more.

use tun_driver::lab::measure::Spread;

/// Three significant digits, without exponent: `658`, `53.5`, `0.716`, `12300`.
pub(super) fn short(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return if value == 0.0 { "0".to_owned() } else { "–".to_owned() };
    }
    let digits = 2 - value.abs().log10().floor() as i32;
    // Rounding first: 9.996 has one digit before the point less than 10.0.
    let scale = 10_f64.powi(digits);
    let rounded = (value * scale).round() / scale;
    let digits = 2 - rounded.abs().log10().floor() as i32;
    format!("{rounded:.*}", digits.clamp(0, 6) as usize)
}

/// The same without zeros at the end, for axes: `0.5`, `2`, `100`.
pub(super) fn plain(value: f64) -> String {
    let told = short(value);
    if told.contains('.') {
        told.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        told
    }
}

/// The quartiles, as fine as [`short`] gives the median: `0.70–0.75`.
pub(super) fn quartiles(value: &Spread, scale: f64) -> String {
    let median = short(value.median * scale);
    let decimals = median.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let zeros = median.len().saturating_sub(3) as i32;
    let step = if decimals == 0 { 10_f64.powi(zeros) } else { 1.0 };
    let [low, high] = [value.lower_quartile, value.upper_quartile].map(|value| {
        if decimals == 0 {
            (value * scale / step).round() * step
        } else {
            value * scale
        }
    });
    format!("{low:.decimals$}–{high:.decimals$}")
}

/// Ratios have two decimals; below 0.1 three digits, as 0.07 stands for anything from 0.065 to
/// 0.075.
pub(super) fn ratio(value: &Spread) -> (String, String) {
    if value.median < 0.0995 {
        return (short(value.median), quartiles(value, 1.0));
    }
    (
        format!("{:.2}", value.median),
        format!("{:.2}–{:.2}", value.lower_quartile, value.upper_quartile),
    )
}

/// `38.2 µs`, `12.3 ms`.
pub(super) fn time(nanos: f64) -> String {
    let (value, unit) = match nanos {
        ..1e3 => (nanos, "ns"),
        ..1e6 => (nanos / 1e3, "µs"),
        ..1e9 => (nanos / 1e6, "ms"),
        _ => (nanos / 1e9, "s"),
    };
    format!("{} {unit}", short(value))
}

/// `200 k`, `1.52 M`.
pub(super) fn rate(pps: f64) -> String {
    match pps {
        ..1e3 => plain(pps),
        ..1e6 => format!("{} k", plain(pps / 1e3)),
        _ => format!("{} M", plain(pps / 1e6)),
    }
}

/// A share as percent; a small one is not rounded to nothing.
pub(super) fn percent(share: f64) -> String {
    match share {
        0.0 => "0".to_owned(),
        ..0.0001 => "< 0.01 %".to_owned(),
        _ => format!("{} %", plain(share * 100.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_no_more() {
        for (value, told) in [
            (658.4, "658"),
            (53.46, "53.5"),
            (0.7164, "0.716"),
            (1.0, "1.00"),
            (9.996, "10.0"),
            (99.97, "100"),
            (0.0, "0"),
            (12_345.0, "12300"),
            (-2.345, "-2.35"),
            (f64::NAN, "–"),
        ] {
            assert_eq!(short(value), told);
        }
        assert_eq!(
            (plain(0.5), plain(2.0), plain(100.0)),
            ("0.5".into(), "2".into(), "100".into())
        );
    }

    #[test]
    fn quartiles_have_the_decimals_of_their_median() {
        let spread = Spread::of(&[9.0, 9.5, 10.0, 10.5, 11.0]).unwrap();
        assert_eq!(quartiles(&spread, 1.0), "9.5–10.5");
        assert_eq!(quartiles(&spread, 100.0), "950–1050", "1000 stands for 995 to 1005");
        assert_eq!(quartiles(&spread, 100.1), "950–1050", "so 951 and 1051 are too fine");
    }

    #[test]
    fn small_ratios_keep_three_digits() {
        let told = |values: &[f64]| ratio(&Spread::of(values).unwrap());
        assert_eq!(told(&[0.066, 0.068, 0.07]), ("0.0680".into(), "0.0670–0.0690".into()));
        assert_eq!(told(&[0.71, 0.72, 0.73]), ("0.72".into(), "0.71–0.72".into()));
        assert_eq!(told(&[0.0999]).0, "0.10");
        assert_eq!(told(&[14.3, 14.6, 14.9]).0, "14.60");
    }

    #[test]
    fn units_change_where_numbers_grow_long() {
        assert_eq!(
            (time(38_200.0), time(1e6), time(999.0)),
            ("38.2 µs".into(), "1.00 ms".into(), "999 ns".into())
        );
        assert_eq!(
            (rate(200e3), rate(1.52e6), rate(20.0)),
            ("200 k".into(), "1.52 M".into(), "20".into())
        );
        assert_eq!(
            (percent(0.0), percent(1e-6), percent(0.5)),
            ("0".into(), "< 0.01 %".into(), "50 %".into())
        );
    }
}
