"""What a person looks at after a run: pictures and a page."""

from lightning_peft.reports.curves import draw_curves, save_curves
from lightning_peft.reports.pictures import draw_importance, save_importance
from lightning_peft.reports.summary import report

__all__ = ["draw_curves", "draw_importance", "report", "save_curves", "save_importance"]
