"""Plain Python: everything that does not need to know Airflow."""
