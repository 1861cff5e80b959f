"""The whole product on one machine: real Airflow components, a local simulator, SQLite files.

`python -m include.local_stack --help` lists what it can do. System tests start the same stack.
"""
