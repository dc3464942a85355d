//! A straight line through what was sampled over time, to tell growth from noise.

use serde::Serialize;

/// value = at_start + slope × time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Line {
    pub at_start: f64,
    /// Per unit of time.
    pub slope: f64,
    /// Share of the values' variance that the line explains, 0 to 1.
    pub r_squared: f64,
}

/// The line of least squares; `None` without two different times.
pub fn line(points: &[(f64, f64)]) -> Option<Line> {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (mean_time, mean_value) = (mean(|point| point.0), mean(|point| point.1));
    let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
        points.iter().map(|&(time, value)| of(time - mean_time, value - mean_value)).sum()
    };
    let (times, values, both) = (sum(&|t, _| t * t), sum(&|_, v| v * v), sum(&|t, v| t * v));
    if points.is_empty() || times == 0.0 {
        return None;
    }
    let slope = both / times;
    let r_squared = if values == 0.0 { 1.0 } else { both * both / (times * values) };
    Some(Line { at_start: mean_value - slope * mean_time, slope, r_squared })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_from_noise() {
        let noise = |i: u32| f64::from(i.wrapping_mul(2_654_435_761) % 1000) - 500.0;
        let flat: Vec<_> = (0..600).map(|i| (f64::from(i) / 600.0, 50_000.0 + noise(i))).collect();
        let growing: Vec<_> = flat.iter().map(|&(time, value)| (time, value + 4000.0 * time)).collect();
        let (flat, growing) = (line(&flat).unwrap(), line(&growing).unwrap());
        assert!(flat.slope.abs() < 150.0 && flat.r_squared < 0.1, "{flat:?}");
        assert!((growing.slope - flat.slope - 4000.0).abs() < 1e-6 && growing.r_squared > 0.9, "{growing:?}");
        assert_eq!(line(&[(1.0, 2.0)]), None);
        assert_eq!(line(&[]), None);
    }
}
