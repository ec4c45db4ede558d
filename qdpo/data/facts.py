"""Sentences for the user about what a chat template did to rows; `example` is what happened to the first of them."""

FACTS = {
    "thinking_stripped": "the chat template leaves out the thoughts of earlier answers in {count:,} pairs, as it will "
    "when the model is served (first: {example})",
    "text_before_answer": "the chat template puts text before {count:,} answers, which is trained on: {example!r}",
    "prompt_kept": "the chat template writes {count:,} prompts differently once an answer follows ({example}); the "
    "form used at inference was kept",
    "thinking_kept": "{count:,} answers have a thought that the chat template would rewrite; they are trained on "
    "unchanged (first: {example})",
    "system_folded": "the chat template does not take system messages ({example}): {count:,} were put before the first "
    "question (data.refused_system=drop leaves them out)",
    "system_left_out": "the chat template does not take system messages ({example}): {count:,} were left out "
    "(data.refused_system=drop)",
    "system_unfoldable": "the chat template does not take system messages ({example}): {count:,} were left out, as "
    "they are followed by an answer, not by a question to put them before. The data report names these rows "
    "(system_unfoldable); begin them with a question, or remove them",
    "empty_thought": "the chat template puts {example!r} before {count:,} answers without a thought, and it is trained "
    "as part of them. Where the model will be served without thinking, set the template's switch, as in "
    "data.template_options.enable_thinking=false",
    "thought_closed": "the prompt opens a thought, and {count:,} answers have none: each is trained with {example!r} "
    "before it. Where the model will be served without thinking, set the template's switch (data.template_options)",
    "calls_not_in_prompt": "the chat template leaves out {count:,} tool calls of earlier turns (first: {example})",
    "tools_not_in_prompt": "the chat template does not tell the model its functions in {count:,} pairs (first: "
    "{example}), as it will not when the model is served",
}
