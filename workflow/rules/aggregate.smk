# Stage 3: raw records to tidy tables.  Seals are checked by content here; a missing or extra record
# of a sealed experiment already stops the reading of the Snakefile.
AGGREGATION_CODE = STUDY.sources(
    "aggregation.py",
    "measurement/composition.py",
    "measurement/record.py",
    "measurement/validity.py",
    "metering/attribution.py",
    "metering/codecarbon.py",
    "work",
)


if not STUDY.is_published:

    rule aggregate:
        input:
            STUDY.measurements,
            models=STUDY.model_files,
            code=AGGREGATION_CODE,
        output:
            parquet="<aggregated>/measurements.parquet",
            csv="<aggregated>/configurations.csv",
        log:
            "logs/aggregate/<campaign>.log",
        conda:
            "../../envs/analysis.yaml"
        threads: 4
        params:
            campaign=STUDY.campaign,
        message:
            "Stage 3: aggregate the records of campaign {STUDY.campaign}"
        shell:
            "t2v-energy aggregate --campaign {params.campaign} --parquet {output.parquet} --csv {output.csv} --processes {threads} 2> {log}"


if STUDY.operator_records:

    rule operator_rates:
        input:
            records=STUDY.operator_records,
            code=STUDY.sources(
                "analysis/operator_rates.py",
                "operator_suite.py",
                "measurement/operator_record.py",
                "metering/attribution.py",
            ),
        output:
            "<aggregated>/operator_rates.csv",
        log:
            "logs/operator_rates/<campaign>.log",
        conda:
            "../../envs/analysis.yaml"
        params:
            campaign=STUDY.campaign,
        message:
            "Stage 3: rates and powers of single operators of campaign {STUDY.campaign}"
        shell:
            "t2v-energy operator-rates --campaign {params.campaign} --out {output} 2> {log}"


rule meter:
    input:
        code=STUDY.sources("metering"),
    output:
        "results/tables/meter.csv",
    log:
        "logs/meter.log",
    conda:
        "../../envs/analysis.yaml"
    message:
        "Try the energy meter on simulated GPUs whose true energy is known"
    shell:
        "t2v-energy meter --out {output} 2> {log}"
