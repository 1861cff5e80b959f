"""Adapts `include/` to Airflow: the DAG, its operators, the sensor and its trigger."""
