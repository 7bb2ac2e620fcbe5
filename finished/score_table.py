"""The scores of a run beside its base's, as text."""

from __future__ import annotations


def format_table(results: dict) -> str:
    """Format the metrics of base and tuned model as a table. results: `evaluate`'s."""
    lines = [f"{'':12} {'base':>12} {'tuned':>12}"]
    for name, values in results["metrics"].items():
        lines.append(f"{name:12} {_format_score(values['base'])} {_format_score(values['tuned'])}")
    return "\n".join(lines)


def _format_score(value: float | None) -> str:
    return f"{'undefined':>12}" if value is None else f"{value:12,.2f}"


def describe_scoring_details(results: dict) -> list[str]:
    """Return lines that explain the table: scorers, undefined values, truncated answers."""
    lines = [f"{name}: {how}" for name, how in results["scored_with"].items()]
    if None in results["metrics"].get("bleu", {}).values():
        lines.append("bleu is undefined where no answer, or no reference, has four tokens")
    too_long = results["too_long"]
    unanswered = results["rows"] - results["answered"] - too_long if results["answers"] else 0
    text_metrics = ", ".join(name for name in results["metrics"] if name != "perplexity")
    for count, reason in (
        (unanswered, "without a question or an answer to compare with"),
        (too_long, f"whose question and images take more than {results['context_length']:,} tokens"),
    ):
        if count:
            lines.append(f"{text_metrics}: of {results['rows']:,} rows {count:,} are left out, {reason}")
    lines += [f"perplexity: {reason}" for reason in results["row_reasons"]]
    base_cut, tuned_cut = results["cut"]["base"], results["cut"]["tuned"]
    if base_cut or tuned_cut:
        lines.append(
            f"of {results['answered']:,} answers {base_cut:,} of the base and {tuned_cut:,} of the tuned"
            f" model were cut at --max_new_tokens {results['max_new_tokens']}"
        )
    return lines
