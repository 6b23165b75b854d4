# Stage 2: one job a batch of configurations, on one GPU.
# Only the batch's index is declared: Snakemake deletes the outputs of failed jobs, and records must outlive them.
# Sealed experiments have no batch here; their records are data.  The shell string names no version of the code,
# so editing the package never sets off hours of measuring.  A job that runs again (other prompts, settings or
# conditions) measures only what has no record yet, and stops where settings or weights of a record differ.
# Ctrl-C leaves tee alone (-i), so that the runner's last words reach the user and the log.
rule measure_batch:
    input:
        prompts="results/prompts/<campaign>.jsonl",
    output:
        "<raw>/{experiment}/batches/{batch}.json",
    log:
        "logs/measure/<campaign>/{experiment}/{batch}.log",
    wildcard_constraints:
        experiment=STUDY.unsealed_pattern,
        batch="[0-9a-f]{10}",
    conda:
        "../../envs/measure.yaml"
    threads: workflow.cores if STUDY.on_gpu else 1
    resources:
        gpu=1 if STUDY.on_gpu else 0,
        measuring=1,
        # an attempt after the first (--retries) finds the records of those before, and still gets more time
        runtime=lambda wildcards, attempt: attempt
        * STUDY.runtime_minutes(wildcards.experiment, wildcards.batch),
        mem_mb=lambda wildcards: STUDY.host_memory_MB(
            wildcards.experiment, wildcards.batch
        ),
    params:
        settings=STUDY.measuring_json,
        conditions=STUDY.conditions,
        missing=lambda wildcards: STUDY.missing_records(
            wildcards.experiment, wildcards.batch
        ),
    message:
        "Stage 2: measure batch {wildcards.batch} of {wildcards.experiment}"
    shell:
        "t2v-energy measure --settings {params.settings:q} --experiment {wildcards.experiment} "
        "--batch {wildcards.batch} --prompts {input.prompts} 2>&1 | tee -i -a {log}"


rule measure:
    input:
        STUDY.batch_indices,
    localrule: True
