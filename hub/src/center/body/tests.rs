//! Tests of the parent module.

use super::*;

#[test]
fn times_are_written_as_the_calendar_has_them() {
    for (ms, text) in [
        (0, "1970-01-01T00:00:00.000Z"),
        (951_782_400_000, "2000-02-29T00:00:00.000Z"),
        (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
        (1_767_225_599_000, "2025-12-31T23:59:59.000Z"),
        (4_107_542_400_001, "2100-03-01T00:00:00.001Z"),
    ] {
        assert_eq!(rfc3339(ms), text);
    }
}

#[test]
fn bad_json_says_where_and_bad_fields_say_which() {
    for (json, kind, field, detail) in [
        ("", Kind::MalformedJson, None, "the body is empty"),
        (" \n", Kind::MalformedJson, None, "the body is empty"),
        ("{", Kind::MalformedJson, None, "line 1 column 1"),
        ("{\n\"payload\": }", Kind::MalformedJson, None, "line 2 column 12"),
        ("{} {}", Kind::MalformedJson, None, "trailing characters"),
        ("[]", Kind::MalformedJson, None, "an object is expected"),
        ("\"x\"", Kind::MalformedJson, None, "object is expected"),
        ("nul", Kind::MalformedJson, None, "line 1 column 3"),
        ("{\"payload\": 7}", Kind::InvalidField, Some("payload"), "expected a string"),
        ("{\"payload\": \"\\ud800\"}", Kind::MalformedJson, None, "line 1"),
        ("{\"payloda\": \"x\"}", Kind::InvalidField, Some("payloda"), "unknown field `payloda`"),
        ("{\"qos\": 1, \"qos\": 1}", Kind::InvalidField, Some("qos"), "duplicate field"),
        ("{\"qos\": -1}", Kind::InvalidField, Some("qos"), "invalid value"),
        ("{\"ttl_seconds\": 4294967296}", Kind::InvalidField, Some("ttl_seconds"), "invalid value"),
        ("{\"properties\": {\"a\": 1}}", Kind::InvalidField, Some("properties.a"), "expected a string"),
    ] {
        let problem = parse::<MessageBody>(json.as_bytes()).expect_err(json);
        assert_eq!((problem.kind, problem.field.as_deref()), (kind, field), "{json}: {problem:?}");
        let detail = detail.replace("an object", "object");
        assert!(problem.detail.contains(&detail), "{json}: {}", problem.detail);
    }
    let invalid_utf8 = parse::<MessageBody>(b"{\"payload\": \"\xff\"}").expect_err("not UTF-8");
    assert_eq!(invalid_utf8.kind, Kind::MalformedJson);
}

#[test]
fn exactly_one_payload() {
    let push = |json: &str| parse::<MessageBody>(json.as_bytes())?.into_push(To::User("alice".to_owned()));
    assert_eq!(push(r#"{"payload": ""}"#).expect("empty is a payload").payload, "");
    let text = push(r#"{"payload": "é"}"#).expect("text");
    assert!(text.properties.payload_is_utf8 && text.payload == "é");
    let binary = push(r#"{"payload_base64": "/wA"}"#).expect("padding may be left out");
    assert!(!binary.properties.payload_is_utf8 && binary.payload[..] == [0xff, 0]);
    assert_eq!(push("{}").expect_err("none").field.as_deref(), Some("payload"));
    assert_eq!(
        push(r#"{"payload": "", "payload_base64": ""}"#).expect_err("two").field.as_deref(),
        Some("payload_base64")
    );
    assert_eq!(push(r#"{"payload_base64": "?"}"#).expect_err("no").field.as_deref(), Some("payload_base64"));
}

#[test]
fn a_batch_line_has_one_receiver() {
    let to = |json: &str| parse::<BatchLine>(json.as_bytes())?.to();
    assert!(matches!(to(r#"{"user": "a"}"#), Ok(To::User(_))));
    assert!(matches!(to(r#"{"group": "a"}"#), Ok(To::Group(_))));
    assert!(matches!(to(r#"{"topic": "a"}"#), Ok(To::Topic(_))));
    for (json, field) in [
        ("{}", "user"),
        (r#"{"user": "a", "group": "b"}"#, "group"),
        (r#"{"user": "a", "topic": "b"}"#, "topic"),
        (r#"{"group": "a", "topic": "b"}"#, "topic"),
        (r#"{"user": "a", "group": "b", "topic": "c"}"#, "group"),
    ] {
        assert_eq!(to(json).expect_err(json).field.as_deref(), Some(field), "{json}");
    }
}
