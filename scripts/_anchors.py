"""Forecasts that anybody can make in seconds, to stand beside every result of a network.

    zeros                the mean of the training stretch
    repeat last value    the last value of the context, for all steps
    repeat last season   the last day (or week, or year) of the context, again and again
    linear               one matrix (L, H) for all channels, closed form

The linear map is ridge regression on windows whose mean was subtracted from context and target and is added back:
with X (n, L) and Y (n, H) of all training windows of all channels,

    W = (X'X + lambda I)^-1 X'Y,   lambda = 1e-3 trace(X'X) / L

It has nothing to tune. A network that does not beat it at the same look-back has learnt nothing beyond it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Forecast = Callable[[np.ndarray], np.ndarray]  # (n, L) contexts of one channel -> (n, H)

_RIDGE = 1e-3
# windows of one channel handled at once
_CHUNK = 4096


def linear_map(values: np.ndarray, rows: tuple[int, int], context: int, horizon: int) -> np.ndarray:
    """The matrix (L, H) fitted on all windows within ``rows`` of ``values`` (T, C)."""
    gram, cross = np.zeros((context, context)), np.zeros((context, horizon))
    for channel in values[slice(*rows)].T:
        windows = sliding_window_view(channel, context + horizon)
        for start in range(0, len(windows), _CHUNK):
            chunk = windows[start : start + _CHUNK]
            chunk = chunk - chunk[:, :context].mean(1, keepdims=True)
            x, y = chunk[:, :context], chunk[:, context:]
            gram += x.T @ x
            cross += x.T @ y
    # a series without any change has nothing to fit, and any matrix forecasts it
    ridge = _RIDGE * np.trace(gram) / context or 1.0
    return np.linalg.solve(gram + ridge * np.eye(context), cross)


def repeat_last(horizon: int, season: int = 1) -> Forecast:
    """The last ``season`` values, repeated."""
    return lambda x: np.tile(x[:, -season:], -(-horizon // season))[:, :horizon]


def apply_linear(matrix: np.ndarray) -> Forecast:
    """The linear map on windows without their mean."""

    def forecast(x: np.ndarray) -> np.ndarray:
        mean = x.mean(1, keepdims=True)
        return (x - mean) @ matrix + mean

    return forecast


def anchor_forecasts(
    values: np.ndarray, train: tuple[int, int], context: int, horizon: int, season: int | None
) -> dict[str, Forecast]:
    """The anchors by name, best-known first; a season that the context does not hold is left out."""
    anchors = {f"linear, closed form, look-back {context}": apply_linear(linear_map(values, train, context, horizon))}
    if season is not None and 1 < season <= context:
        anchors[f"repeat last {season} steps"] = repeat_last(horizon, season)
    anchors["repeat last value"] = repeat_last(horizon)
    anchors["mean of the training rows"] = lambda x: np.zeros((len(x), horizon))
    return anchors


def score(
    forecast: Forecast, values: np.ndarray, rows: tuple[int, int], context: int, horizon: int
) -> dict[str, float]:
    """MSE and MAE of a forecast over every window whose target lies within ``rows``."""
    squared = absolute = 0.0
    count = 0
    for channel in values[rows[0] - context : rows[1]].T:
        windows = sliding_window_view(channel, context + horizon)
        for start in range(0, len(windows), _CHUNK):
            chunk = windows[start : start + _CHUNK]
            error = forecast(chunk[:, :context]) - chunk[:, context:]
            squared += float((error**2).sum())
            absolute += float(np.abs(error).sum())
            count += error.size
    return {"mse": squared / count, "mae": absolute / count}
