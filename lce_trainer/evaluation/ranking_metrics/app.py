"""The page of the Hub space: a form that computes the metric."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("ranking_metrics.py"))
