"""What people look at: pictures of a run, models in the registry, the parent run's page in MLflow."""

from jf_cluster.dashboard.showing import show

__all__ = ["show"]
