"""A cluster that notes what each submission asks for and then refuses it: nothing is run.

Snakemake finds it when this folder's parent is on the PYTHONPATH; ``SUBMISSIONS`` names the file to write,
one JSON object a submission.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path

from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface
from snakemake_interface_executor_plugins.settings import CommonSettings

common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    pass_default_storage_provider_args=True,
    pass_default_resources_args=True,
    pass_envvar_declarations_to_cmd=True,
    auto_deploy_default_storage_provider=False,
    init_seconds_before_status_checks=0,
)


class Executor(RemoteExecutor):
    """Records submissions."""

    def run_job(self, job: JobExecutorInterface) -> None:
        """Note the resources as a scheduler would be asked for them."""
        members = [member.rule.name for member in job.jobs] if job.is_group() else [job.rule.name]
        asked = {key: value for key, value in job.resources.items() if isinstance(value, int | str)}
        with Path(os.environ["SUBMISSIONS"]).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"rules": members, "resources": asked}) + "\n")
        self.report_job_submission(SubmittedJobInfo(job=job, external_jobid=str(job.jobid)))

    async def check_active_jobs(
        self, active_jobs: list[SubmittedJobInfo]
    ) -> AsyncGenerator[SubmittedJobInfo, None]:
        """Every job has failed."""
        for job in active_jobs:
            self.report_job_error(job)
        for job in ():
            yield job

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        """There is nothing to cancel."""
