"""An auth manager in which a user has a role for some DAGs only, over real tokens and cookies.

A user is named `<who>@<dag>`, such as `vera@ticket_triage`: the role of the simple auth manager
holds for that DAG, and for no other. `SimpleAuthManager` itself knows no such thing.
"""

from __future__ import annotations

from typing import Any

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager

DATA = {DagAccessEntity.CODE, DagAccessEntity.XCOM}


class DagOwners(SimpleAuthManager):
    """See the module. Users whose name begins with `blind` may not read code and XComs."""

    def is_authorized_dag(
        self,
        *,
        method: Any,
        user: Any,
        access_entity: DagAccessEntity | None = None,
        details: DagDetails | None = None,
    ) -> bool:
        """Say yes where the simple auth manager does and the DAG is the user's own."""
        name, _, dag_id = user.username.partition("@")
        if details is None or details.id != dag_id:
            return False
        if name == "blind" and access_entity in DATA:
            return False
        return bool(
            super().is_authorized_dag(
                method=method, user=user, access_entity=access_entity, details=details
            )
        )
