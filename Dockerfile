# The locked packages on plain Python: the same versions that the tests run with.
FROM python:3.12-slim-bookworm

RUN useradd --uid 50000 --create-home airflow \
    && install -d -o airflow /opt/airflow /opt/airflow/logs /opt/airflow/artifacts \
       /opt/airflow/auth /opt/airflow/simulator

COPY requirements.txt /requirements.txt
RUN pip install --no-cache-dir --require-hashes -r /requirements.txt

USER 50000
WORKDIR /opt/airflow
# include/ is importable only through PYTHONPATH: Airflow itself adds just dags/ and plugins/.
ENV AIRFLOW_HOME=/opt/airflow PYTHONPATH=/opt/airflow:/opt/airflow/plugins PYTHONUNBUFFERED=1
COPY --chown=root:root include include
COPY --chown=root:root plugins plugins
COPY --chown=root:root dags dags
