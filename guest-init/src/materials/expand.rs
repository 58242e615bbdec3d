//! `$(NAME)` in commands, arguments and values (Kubernetes, "Define Dependent Environment Variables").

/// Longest string that Linux takes among a program's arguments and variables (`MAX_ARG_STRLEN`, with its final zero).
pub const LONGEST: usize = (128 << 10) - 1;

/// Why a text could not be expanded.
#[derive(Debug, PartialEq, Eq)]
pub enum ExpandError<'a> {
    /// Nothing has the name, and that matters here.
    Unknown(&'a str),
    /// The result would be longer than [`LONGEST`].
    TooLong,
}

/// Replaces each `$(NAME)` by what `value` has for it. `$$` stands for `$`, so `$$(NAME)` for the text itself. What is unknown
/// stays as it is written, unless `strict`.
pub fn expand<'a, 'v>(
    text: &'a str,
    strict: bool,
    value: impl Fn(&str) -> Option<&'v str>,
) -> Result<String, ExpandError<'a>> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let reference = after.strip_prefix('(').and_then(|inner| inner.split_once(')'));
        if let Some(escaped) = after.strip_prefix('$') {
            expanded.push('$');
            rest = escaped;
        } else if let Some((name, behind)) = reference {
            match value(name) {
                Some(value) => expanded.push_str(value),
                None if strict => return Err(ExpandError::Unknown(name)),
                None => expanded.extend(["$(", name, ")"]),
            }
            rest = behind;
        } else {
            expanded.push('$');
            rest = after;
        }
        if expanded.len() > LONGEST {
            return Err(ExpandError::TooLong);
        }
    }
    expanded.push_str(rest);
    if expanded.len() > LONGEST {
        return Err(ExpandError::TooLong);
    }
    Ok(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(name: &str) -> Option<&'static str> {
        match name {
            "A" => Some("1"),
            "EMPTY" => Some(""),
            "MONEY" => Some("$(A)"),
            _ => None,
        }
    }

    #[test]
    fn references_escapes_and_what_is_neither() {
        for (text, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("$(A)", "1"),
            ("<$(A)$(A)>", "<11>"),
            ("$(EMPTY)", ""),
            ("$(NOPE)", "$(NOPE)"),
            ("$()", "$()"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$$$(A)", "$$(A)"),
            ("$A ${A} $ $", "$A ${A} $ $"),
            ("$(A", "$(A"),
            ("$(A$(A)", "$(A$(A)"),
            ("$(MONEY)", "$(A)"),
            ("ä$(A)ö$ü", "ä1ö$ü"),
        ] {
            assert_eq!(expand(text, false, value).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_path_must_not_have_what_is_unknown() {
        assert_eq!(expand("a/$(NOPE)", true, value), Err(ExpandError::Unknown("NOPE")));
        assert_eq!(expand("a/$$(NOPE)", true, value).as_deref(), Ok("a/$(NOPE)"));
    }

    #[test]
    fn a_text_that_grows_without_bound_is_refused() {
        let long = "x".repeat(LONGEST);
        assert_eq!(expand(&long, false, value).map(|text| text.len()), Ok(LONGEST));
        assert_eq!(expand(&format!("{long}y"), false, value), Err(ExpandError::TooLong));
        let many = "$(L)".repeat(1000);
        let huge = expand(&many, false, |_| Some(long.as_str()));
        assert_eq!(huge, Err(ExpandError::TooLong));
    }
}
