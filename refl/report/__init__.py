"""Reports: training logs, contact sheets, the model card, statistics and HTML page of an evaluation."""
