# The official image without optional providers, and the locked packages that the tests run with.
FROM apache/airflow:slim-3.3.2-python3.12

USER root
RUN install -d -o airflow -g 0 -m 0775 /opt/airflow/auth /opt/airflow/objects /opt/airflow/simulator

USER airflow
COPY requirements-cluster.txt /requirements.txt
RUN pip install --no-cache-dir --require-hashes -r /requirements.txt

# include/ is importable only through PYTHONPATH: Airflow itself adds just dags/ and plugins/.
ENV PYTHONPATH=/opt/airflow:/opt/airflow/plugins
COPY --chown=root:0 include /opt/airflow/include
COPY --chown=root:0 plugins /opt/airflow/plugins
COPY --chown=root:0 dags /opt/airflow/dags
