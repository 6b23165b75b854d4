# Stage 3: raw records to tidy tables.  Seals are checked by content here; a missing or extra record
# of a sealed experiment already stops the reading of the Snakefile.
rule aggregate:
    input:
        STUDY.measurements,
    output:
        parquet="<aggregated>/measurements.parquet",
        csv="<aggregated>/configurations.csv",
    log:
        "logs/aggregate/<campaign>.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        settings=STUDY.settings_json,
    message:
        "Stage 3: aggregate the records of campaign {STUDY.campaign}"
    shell:
        "t2v-energy aggregate --settings {params.settings:q} --parquet {output.parquet} --csv {output.csv} 2> {log}"


rule meter:
    output:
        "results/tables/meter.csv",
    log:
        "logs/meter.log",
    conda:
        "../../envs/measure.yaml"
    message:
        "Try the energy meter on simulated GPUs whose true energy is known"
    shell:
        "t2v-energy meter --out {output} 2> {log}"
