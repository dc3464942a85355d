//! `carillon push`.

use carillon_client::backend::{Push, To};

use super::{CliError, backend, print, text};
use crate::args::PushArgs;

pub async fn run(args: PushArgs) -> Result<(), CliError> {
    let backend = backend(&args.client)?;
    let (to, words) = receiver(args.user_and_text, args.group, args.topic)?;
    let mut message = Push::new(text(words)?);
    message.qos = Some(args.qos);
    message.ttl_seconds = args.ttl;
    message.id = args.id;
    message.retain = args.retain.then_some(true);
    message.store = match (args.store, args.no_store) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    };
    let pushed = backend.push(&to, &message).await?;
    print(args.client.people.output, &pushed, |pushed| {
        let again = if pushed.duplicate { " (it was there already)" } else { "" };
        format!("accepted as {} number {}, id {}{again}", pushed.topic, pushed.seq, pushed.id)
    })
}

/// Who it is for, and what it says.
fn receiver(
    mut words: Vec<String>,
    group: Option<String>,
    topic: Option<String>,
) -> Result<(To, String), CliError> {
    let to = match (group, topic) {
        (Some(group), _) => Some(To::Group(group)),
        (None, Some(topic)) => Some(To::Topic(topic)),
        (None, None) => None,
    };
    let last = words.pop();
    match (to, words.pop(), last) {
        (Some(to), None, Some(text)) => Ok((to, text)),
        (Some(_), Some(user), _) => Err(CliError::Usage(format!(
            "{user:?} is one argument too many: with --group or --topic only the text is given"
        ))),
        (None, Some(user), Some(text)) => Ok((To::User(user), text)),
        (None, None, Some(only)) => Err(CliError::Usage(format!(
            "only {only:?} is given: the user comes first, then the text, as in: carillon push alice \"hello\""
        ))),
        (_, _, None) => Err(CliError::Usage("the text is missing".to_owned())),
    }
}
