"""The control beside the trained model: TF-IDF with logistic regression on the same records."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """How often the control names the right tool on `n` held-out texts."""

    accuracy: float
    n: int


def control(
    train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str], test_labels: Sequence[str]
) -> Control:
    """Fits on words and character n-grams of the training texts; the same input gives the same result."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    model = make_pipeline(make_union(words, characters), LogisticRegression(C=10.0, max_iter=2_000))
    model.fit(list(train_texts), list(train_labels))
    return Control(accuracy=float(model.score(list(test_texts), list(test_labels))), n=len(test_labels))
