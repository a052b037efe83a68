"""Preprocessing: missing values are imputed, numbers standardized, text one-hot."""

from typing import Any, cast

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from experiments.support.cli import InputError
from experiments.support.table_io import listed, warn

MAX_STANDARDIZED = 1e15  # larger values could overflow
MAX_WITHOUT_INDICATOR = 0.01  # of the training rows may lack a value


def fit(name: str, features: pd.DataFrame, missing: str) -> ColumnTransformer:
    """Fits a preprocessor that standardizes numbers and one-hot encodes categories.

    Missing values are imputed. Categories that do not occur in these rows become all
    zeros. Constant numbers become zero in all rows, and constant categories are left
    out, because nothing can be learned about other values.

    Args:
      name: Name of the data in messages.
      features: Columns of float64 numbers, or of text if they hold categories.
      missing: A value of --missing.

    Raises:
      InputError: If numbers are too large to standardize.
    """
    numbers = list(features.select_dtypes(float))
    different = features.nunique().to_dict()
    share_missing = features.isna().mean()
    tolerated = MAX_WITHOUT_INDICATOR if missing == "impute" else 0
    is_missing = (share_missing > tolerated) & (share_missing < 1)
    transformer = ColumnTransformer(
        [
            (
                "numbers",
                make_pipeline(
                    StandardScaler(),
                    SimpleImputer(strategy="median", keep_empty_features=True),
                ),
                numbers,
            ),
            (
                "categories",
                make_pipeline(
                    SimpleImputer(strategy="most_frequent"),
                    OneHotEncoder(
                        handle_unknown="ignore",
                        sparse_output=False,
                        feature_name_combiner=cast(Any, _category_name),
                    ),
                ),
                [c for c in features if c not in numbers and different[c] > 1],
            ),
            (
                "missing",
                MissingIndicator(features="all"),
                list(features.columns[is_missing]),
            ),
        ],
    )
    with np.errstate(all="ignore"):
        x = np.asarray(transformer.fit_transform(features))
    if not (x != x[:1]).any():
        raise InputError(f"{name}: all features are constant in the training rows")
    if numbers:
        _, (scaler, _), _ = transformer.transformers_[0]
        is_varied = np.array([different[c] > 1 for c in numbers])
        too_large = is_varied & ~np.isfinite(scaler.var_)
        if too_large.any():
            column = numbers[int(np.argmax(too_large))]
            raise InputError(
                f"{name}: column {column!r} has values too large to standardize; "
                "rescale it, or leave it out with --drop"
            )
        scaler.scale_ = np.where(is_varied, scaler.scale_, np.inf)
    return transformer


def _category_name(column: str, category: str) -> str:
    """A name for each column of ones and zeros: "a_b" of "c" is not "a" of "b_c"."""
    return f"{column}={category!r}"


def transform(
    name: str, transformer: ColumnTransformer, features: pd.DataFrame
) -> np.ndarray:
    """Preprocessed features `[N, n_0]`, float64.

    Numbers that are too large to standardize are imputed, and counted on stderr.
    """
    kept = mask_too_large(transformer, features)
    if kept is not features:
        lost = (kept.isna() & features.notna()).to_numpy().sum(axis=0)
        for column, count in zip(kept.columns[lost > 0], lost[lost > 0], strict=True):
            warn(name, f"{column!r} is too large in {count} rows; treated as missing")
    return np.asarray(transformer.transform(kept), np.float64)


def mask_too_large(
    transformer: ColumnTransformer, features: pd.DataFrame
) -> pd.DataFrame:
    """The features, with NaN for numbers that are too large to standardize."""
    _, (scaler, *_), numbers = transformer.transformers_[0]
    if not numbers:
        return features
    with np.errstate(all="ignore"):
        standardized = scaler.transform(features[numbers])
    too_large = np.abs(standardized) >= MAX_STANDARDIZED
    if not too_large.any():
        return features
    return features.assign(**features[numbers].mask(too_large))


def categories(transformer: ColumnTransformer) -> dict[str, np.ndarray]:
    """The categories that occurred in training, by column."""
    _, fitted, names = transformer.transformers_[1]
    return dict(zip(names, fitted[-1].categories_, strict=True)) if names else {}


def warn_of_new_categories(
    name: str, transformer: ColumnTransformer, features: pd.DataFrame
) -> None:
    """Reports categories that did not occur in training on stderr."""
    for column, known in categories(transformer).items():
        values = features[column].dropna()
        new = values[~values.isin(list(known))]
        if len(new):
            shown = listed(dict.fromkeys(new))
            warn(
                name, f"{column!r} is {shown} in {len(new)} rows, not seen in training"
            )
