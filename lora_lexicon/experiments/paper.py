"""What the LM-Lexicon paper reports, beside which our results are shown. Its base, data and scores are not ours."""

from lora_lexicon.report.document import Figure, Table

NOTE = (
    "From the paper: Llama-3-8B on 3D-EX, BLEU and ROUGE-L as its code computes them, mean and deviation over seeds "
    "21, 42, 84. Not to be compared with figures of another base, other data or other signatures."
)
_SOURCES = ("WordNet", "Oxford", "Wiki", "Urban", "3D-EX")
_SYSTEMS = {  # (BLEU, ROUGE-L) of each source
    "Rerank-T5 (2021)": (30.91, 30.99, 25.56, 28.00, 55.61, 57.25, 17.77, 18.25, 34.43, 38.57),
    "Contrast-T5 (2022)": (30.81, 26.27, 22.51, 28.18, 55.26, 42.27, 17.53, 16.34, 34.27, 37.62),
    "SimpDefiner (2022)": (28.91, 20.47, 23.48, 29.59, 44.03, 49.26, 13.54, 15.37, 32.08, 31.57),
    "MDM-T5 (2023)": (31.18, 32.55, 24.16, 27.68, 54.33, 55.83, 17.53, 17.18, 32.67, 32.38),
    "Flan-T5-Def (2023)": (31.96, 40.45, 21.34, 32.39, 13.82, 23.97, 5.33, 10.61, 26.43, 25.12),
    "LlamaDict (2024)": (33.86, 43.50, 22.77, 36.46, 14.38, 25.29, 15.70, 14.51, 24.56, 26.11),
    "GPT-4-Turbo, random examples": (30.95, 32.61, 21.93, 30.82, 31.63, 45.89, 11.08, 12.19, 25.93, 34.48),
    "GPT-4-Turbo, retrieved examples": (27.46, 29.74, 20.44, 34.35, 35.40, 40.68, 22.53, 26.53, 29.73, 37.66),
    "Claude-3-Opus, random examples": (28.63, 27.84, 19.99, 34.21, 23.30, 35.22, 1.59, 3.08, 18.57, 28.49),
    "Claude-3-Opus, retrieved examples": (18.57, 21.76, 15.51, 25.99, 14.59, 15.83, 5.93, 7.19, 17.46, 24.67),
    "Gemini-1.5-Pro, random examples": (23.42, 26.27, 25.51, 35.97, 36.87, 48.13, 8.44, 9.59, 29.4, 38.02),
    "Gemini-1.5-Pro, retrieved examples": (25.24, 27.88, 28.10, 36.98, 35.59, 43.71, 8.85, 9.18, 32.99, 39.14),
    "dense": (36.99, 37.83, 26.09, 34.55, 57.9, 59.56, 26.09, 28.35, 35.01, 43.32),
    "dense, best of N by the reference": (47.90, 44.19, 30.07, 42.78, 62.07, 68.62, 36.16, 38.87, 48.78, 49.71),
    "dense, best of N by reward": (37.73, 37.94, 26.74, 35.18, 59.33, 59.40, 26.73, 28.54, 34.83, 42.68),
    "moe": (40.09, 40.51, 23.35, 32.94, 60.31, 55.52, 31.26, 33.81, 45.69, 46.07),
    "moe, best of N by the reference": (47.39, 40.31, 30.87, 43.24, 51.62, 61.88, 35.23, 35.69, 54.84, 50.50),
    "moe, best of N by reward": (40.33, 40.69, 24.18, 33.79, 60.88, 57.66, 31.08, 33.26, 45.86, 46.38),
}


def table_2() -> Table:
    columns = ["system", *(f"{source}: {metric}" for source in _SOURCES for metric in ("BLEU", "ROUGE-L"))]
    return Table("Table 2 of the paper", columns, [[name, *scores] for name, scores in _SYSTEMS.items()], NOTE)


def table_3() -> Table:
    rows = [
        ["semantic", Figure(45.69, deviation=0.3), Figure(46.07, deviation=0.1), "–"],
        ["none", Figure(35.13, deviation=0.2), Figure(43.46, deviation=0.3), "2.9e-5"],
        ["random", Figure(36.24, deviation=1.4), Figure(43.58, deviation=0.8), "1.6e-5"],
        ["lexical", Figure(38.13, deviation=0.5), Figure(44.12, deviation=0.6), "1.3e-4"],
    ]
    return Table("Table 3 of the paper", ("partition", "BLEU", "ROUGE-L", "p"), rows, NOTE)


def table_4() -> Table:
    rows = [
        ["domain", Figure(45.69, deviation=0.3), Figure(46.07, deviation=0.1), "–"],
        ["token-top-1", Figure(43.12, deviation=0.4), Figure(43.79, deviation=0.5), "1.9e-3"],
        ["token-top-2", Figure(45.38, deviation=0.2), Figure(45.21, deviation=0.1), "8.6e-1"],
        ["sequence-soft", Figure(44.47, deviation=0.2), Figure(44.82, deviation=0.3), "2.7e-3"],
    ]
    return Table("Table 4 of the paper", ("routing", "BLEU", "ROUGE-L", "p"), rows, NOTE)


def table_6() -> Table:
    rows = [["dense", "8 x H100", 4.2e18, 36.4, 11.4], ["moe", "8 x H100", 5.4e18, 32.8, 14.6]]
    return Table("Table 6 of the paper", ("system", "hardware", "FLOPs", "hours", "kg CO2"), rows)


def tables_7_8() -> list[Table]:
    names = ("Adjective", "Scientific", "Proper Noun", "Person Name")
    within = [[name, value] for name, value in zip(names, (0.176, 0.168, 0.173, 0.185), strict=True)]
    pairs = [(0, 1, 0.694), (0, 2, 0.713), (0, 3, 0.765), (1, 2, 0.681), (1, 3, 0.707), (2, 3, 0.720)]
    between = [[f"{names[i]}, {names[j]}", value] for i, j, value in pairs]
    return [
        Table("Table 7 of the paper: cohesion", ("domain", "distance"), [*within, ["mean", 0.175]]),
        Table("Table 8 of the paper: separation", ("domains", "distance"), [*between, ["mean", 0.713]]),
    ]


def figure_5() -> Table:
    note = f"{NOTE} The text names only these two of the figure's points."
    return Table("Figure 5 of the paper", ("experts", "BLEU"), [[1, 41.38], [8, 46.86]], note)
