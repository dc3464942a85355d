//! Kubernetes' quantities: `500m`, `1Gi`, `0.5`, `1e3`.

/// Powers of ten and of two by suffix.
const SUFFIXES: [(&str, f64); 15] = [
    ("Ki", 1024.0),
    ("Mi", 1048576.0),
    ("Gi", 1073741824.0),
    ("Ti", 1099511627776.0),
    ("Pi", 1125899906842624.0),
    ("Ei", 1152921504606846976.0),
    ("n", 1e-9),
    ("u", 1e-6),
    ("m", 1e-3),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
    ("P", 1e15),
    ("E", 1e18),
];

/// What it comes to; None: it is no quantity. Exact for what disks and processors have.
pub fn value(text: &str) -> Option<f64> {
    let is_number =
        |text: &str| text.starts_with(|first: char| first.is_ascii_digit() || "+-.".contains(first));
    if !is_number(text) {
        return None;
    }
    if let Ok(plain) = text.parse::<f64>() {
        return plain.is_finite().then_some(plain);
    }
    let (suffix, factor) = SUFFIXES.iter().find(|(suffix, _)| text.ends_with(suffix))?;
    let number: f64 = text.strip_suffix(suffix)?.parse().ok()?;
    number.is_finite().then_some(number * factor)
}

/// Do both come to the same?
pub fn same(one: &str, other: &str) -> bool {
    match (value(one), value(other)) {
        (Some(one), Some(other)) => (one - other).abs() <= one.abs() * 1e-12,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read() {
        for (text, expected) in
            [("500m", 0.5), ("1Gi", 1073741824.0), ("1G", 1e9), ("1e3", 1000.0), ("2E", 2e18), (".5", 0.5)]
        {
            assert!((value(text).unwrap() - expected).abs() < 1e-9 * expected, "{text}");
        }
        for text in ["", "Gi", "a", "inf", "NaN", "1.2.3", "1 Gi", "true"] {
            assert_eq!(value(text), None, "{text}");
        }
        assert!(same("0.1", "100m") && same("1048576Ki", "1Gi") && !same("1Gi", "1G") && !same("a", "a"));
    }
}
