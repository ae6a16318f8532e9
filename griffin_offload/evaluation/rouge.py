"""ROUGE of summaries, as the paper's tables have it."""

from rouge_score.rouge_scorer import RougeScorer

METRICS = ("rouge1", "rouge2", "rougeL")


def rouge(summary: str, reference: str, end: str) -> dict[str, float]:
    """F1 of ROUGE-1, 2 and L, in percent, of what is before `end`; an empty summary scores 0."""
    summary = summary.split(end)[0].strip() if end else summary.strip()
    if not summary:
        return dict.fromkeys(METRICS, 0.0)
    scores = RougeScorer(list(METRICS), use_stemmer=False).score(reference, summary)
    return {name: 100 * scores[name].fmeasure for name in METRICS}
