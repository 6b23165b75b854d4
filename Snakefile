# The entry of the workflow: which campaign, and what to build of it.
# How each thing is built is in workflow/rules/, one file a stage.
from pathlib import Path

from snakemake.utils import min_version

from t2v_energy.dag import workflow_dag

min_version("9.25")


configfile: "config/config.yaml"


STUDY = workflow_dag(Path(workflow.basedir), config)


# One GPU for each submission: jobs of a group run one after the other, on the same GPU; and a limit of
# one here does not hold a whole cluster to one measurement at a time.
resource_scopes:
    gpu="local",
    measuring="local",


pathvars:
    campaign=STUDY.campaign,
    figures=STUDY.figures,
    raw=f"results/raw/{STUDY.campaign}",
    aggregated=f"results/aggregated/{STUDY.campaign}",
    tables=f"results/tables/{STUDY.campaign}",
    numbers=f"results/numbers/{STUDY.campaign}",


include: "workflow/rules/prompts.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/aggregate.smk"
include: "workflow/rules/published.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/beside.smk"
include: "workflow/rules/paper.smk"


rule all:
    default_target: True
    input:
        rules.figures.input,
        rules.tables.input,
        rules.paper.input if STUDY.is_paper_campaign else [],
    localrule: True
