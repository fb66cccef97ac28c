"""What others reach on the same data: programs for an interpreter that has them. Each prints one JSON object."""

DRAIN3 = """
import csv, json, sys, time
from drain3 import TemplateMiner
from drain3.template_miner_config import TemplateMinerConfig

folder, corpus, names = sys.argv[1], sys.argv[2], sys.argv[3:]
groups = {}
for name in names:
    with open(f"{folder}/loghub/{name}/{name}_2k.log_structured.csv", encoding="utf-8", newline="") as file:
        miner = TemplateMiner(config=TemplateMinerConfig())
        groups[name] = [miner.add_log_message(row["Content"])["cluster_id"] for row in csv.DictReader(file)]
with open(corpus, encoding="utf-8", errors="replace") as file:
    lines = [line.rstrip() for line, _ in zip(file, range(50_000))]
miner = TemplateMiner(config=TemplateMinerConfig())
began = time.process_time()
for line in lines:
    miner.add_log_message(line)
print(json.dumps({"groups": groups, "lines_per_s": len(lines) / (time.process_time() - began)}))
"""

# Logistic regression on 4096 hashed words; `online` sees each line's label after its guess, `frozen` the first half.
SKLEARN = """
import csv, json, sys, time
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier

with open(f"{sys.argv[1]}/loghub/BGL/BGL_2k.log_structured.csv", encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
labels = [row["Label"] for row in rows]
hashed = HashingVectorizer(n_features=4096, ngram_range=(1, 2)).transform(
    f"{row['Component']} {row['Level']} {row['Content']}" for row in rows
)
told = {}
for name in ("online", "frozen"):
    model = SGDClassifier(loss="log_loss", random_state=1)
    half, guesses, spent = len(rows) // 2, [], 0.0
    for n, label in enumerate(labels):
        if n >= half:
            began = time.process_time()
            guesses.append(model.predict(hashed[n])[0])
            spent += time.process_time() - began
        if n < half or name == "online":
            model.partial_fit(hashed[n], [label], classes=sorted(set(labels)))
    pairs = list(zip(labels[half:], guesses))
    both = [(is_, guess) for is_, guess in pairs if is_ != "-" and guess != "-"]
    alerts, raised = sum(is_ != "-" for is_, _ in pairs), sum(guess != "-" for _, guess in pairs)
    told[name] = {
        "f1": 2 * len(both) / (alerts + raised) if alerts + raised else 0.0,
        "right": sum(is_ == guess for is_, guess in both), "detected": len(both),
        "us_per_line": spent / len(guesses) * 1e6,
    }
levels = [row["Level"] in ("FATAL", "FAILURE") for row in rows[half:]]
right = sum(raised and label != "-" for raised, label in zip(levels, labels[half:]))
told["level"] = {"f1": 2 * right / (sum(levels) + sum(label != "-" for label in labels[half:]))}
print(json.dumps(told))
"""
