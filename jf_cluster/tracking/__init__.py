"""What a run tells while it goes on: MLflow for the record and the dashboard, one small file for ``status``.

One parent run per distillation, one nested run per stage of a round, found again when a run resumes. Only the driver
writes: actors and ranks report to it, so the number of writers does not grow with the cluster.
"""

from jf_cluster.tracking.activity import Activity
from jf_cluster.tracking.stage_run import StageRun
from jf_cluster.tracking.store import tracking_uri
from jf_cluster.tracking.tracker import Tracker

__all__ = ["Activity", "StageRun", "Tracker", "tracking_uri"]
