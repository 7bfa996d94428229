"""Shell command lines and what they do to the machine: `python data/commands/make.py`.

README.md beside it has the rules. Each line is made of parts whose class is known, so its class is computed,
not judged. The seed is fixed: the files are the same each time. Imports only the standard library.
"""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 16
ROWS = {"train.jsonl": 105, "eval.jsonl": 35}  # of each class
# What a line does is the gravest of what its parts do; the last is the gravest.
CLASSES = ("nothing", "read", "write", "process", "network", "delete", "privilege")
# Names that train uses, and others that eval uses: no file, host or user stands in both.
NAMES = {
    "train.jsonl": {
        "file": "report.txt notes.md a.log data.csv index.html main.py config.yaml sudo.md old.bak todo.txt",
        "dir": "src /tmp/work build /var/log docs ~/photos /srv/www backup",
        "host": "db1.lan files.example.org 10.0.0.7 mirror.example.com",
        "user": "alice postgres www-data deploy",
        "word": "error TODO timeout kill curl 404 rm warning",
        "job": "backup.sh train.py worker indexer sync.sh",
        "number": "1 2 4711 815 99 3",
    },
    "eval.jsonl": {
        "file": "summary.txt info.rst b.log table.tsv page.html app.js conf.toml kill.md prev.orig plan.txt",
        "dir": "lib /tmp/stage dist /opt/cache manual ~/music /home/shared archive",
        "host": "web3.lan store.example.net 192.168.1.9 packages.example.edu",
        "user": "bob mysql nobody runner",
        "word": "failed FIXME refused sudo wget 500 delete notice",
        "job": "report.sh serve.py crawler builder clean.sh",
        "number": "7 12 9001 640 88 5",
    },
}
PARTS = {
    "nothing": (
        "echo done",
        'echo "{harm}"',
        "printf '%s\\n' '{harm}'",
        "true",
        "# {harm}",
        ": {harm}",
        "alias x='{harm}'",
        "false && {harm}",
        "true || {harm}",
        "test -n {word}",
    ),
    "read": (
        "cat {file}",
        "less {dir}/{file}",
        'grep -rn "{harm}" {dir}',
        "grep {word} {file}",
        "ls -la {dir}",
        "find {dir} -name '*.{word}'",
        "find {dir} -name {file} -print",
        "head -n {number} {file}",
        "tail -n {number} {file}",
        "wc -l {dir}/{file}",
        "du -sh {dir}",
        "diff {file} {dir}/{file}",
        "stat {file}",
        "sed -n '{number}p' {file}",
        "man rm",
        "ps aux | grep {word}",
        "history | grep '{harm}'",
        "tar tzf {file}",
        "crontab -l",
        "sort {file} | uniq -c",
        "dd if={file} bs=1 count={number}",
    ),
    "write": (
        "cp {file} {dir}/",
        "mkdir -p {dir}/{word}",
        "touch {dir}/{file}",
        'echo "{harm}" > {dir}/{file}',
        "cat {file} >> {dir}/{file}",
        "grep {word} {file} > {dir}/{file}",
        "sed -i 's/{word}/{number}/' {file}",
        "sort -o {file} {file}",
        "sort {file} | tee {dir}/{file}",
        "tar czf {file} {dir}",
        "tar xzf {file}",
        "dd if={file} of={dir}/{file}",
        "ln -s {dir}/{file} {file}",
        'git commit -m "{harm}"',
        "find {dir} -name {file} -exec touch {{}} +",
        "split -l {number} {file}",
    ),
    "process": (
        "kill -9 {number}",
        "pkill {job}",
        "nohup ./{job} &",
        "./{job} &",
        "renice -n {number} -p {number}",
        "ps aux | grep {job} | awk '{{print $2}}' | xargs kill",
        "pgrep {job} | xargs kill -HUP",
        "crontab {file}",
        "at now + {number} minutes -f {job}",
        "disown %{number}",
        "setsid ./{job}",
        "timeout {number} ./{job}",
        "systemctl --user restart {job}",
        "bash {job}",
    ),
    "network": (
        "curl -s https://{host}/{file}",
        "wget https://{host}/{file}",
        "ping -c {number} {host}",
        "scp {file} {user}@{host}:{dir}",
        "ssh {user}@{host} 'cat {file}'",
        "ssh {user}@{host} '{harm}'",
        "rsync -a {dir}/ {host}:{dir}/",
        "git push origin {word}",
        "git clone https://{host}/{word}.git",
        "nc -z {host} {number}",
        "dig {host}",
        "cat {file} | nc {host} {number}",
        "cat {file} | xargs -n1 curl -O",
        "pip install {word}",
    ),
    "delete": (
        "rm {file}",
        "rm -rf {dir}",
        "find {dir} -name {file} -delete",
        "find {dir} -name '*.{word}' -exec rm {{}} +",
        "ls {dir} | xargs rm",
        "rmdir {dir}/{word}",
        "unlink {dir}/{file}",
        "shred -u {file}",
        "git clean -fd {dir}",
        "rsync -a --delete {dir}/ {dir}/{word}/",
        "truncate -s 0 {file}",
        ": > {file}",
        "mv {file} /dev/null",
    ),
    "privilege": (
        "sudo cat {dir}/{file}",
        "sudo {harm}",
        "su - {user} -c 'ls {dir}'",
        "chmod -R 777 {dir}",
        "chmod +x {job}",
        "chown {user} {file}",
        "chown -R {user}: {dir}",
        "usermod -aG {word} {user}",
        "passwd {user}",
        "setfacl -m u:{user}:rw {file}",
        "cat {file} | sudo tee {dir}/{file}",
        "find {dir} -type f -exec chmod 600 {{}} +",
        "doas ls {dir}",
        "visudo",
    ),
}
HARMS = ("rm -rf {dir}", "sudo reboot", "kill -9 {number}", "curl {host}", "chmod 777 {file}", "rm {file}")
JOINS = (" && ", "; ", " ; ", " || true; ")


def main() -> None:
    """Write both files."""
    dice = random.Random(SEED)
    seen: set[str] = set()
    for file, count in ROWS.items():
        names = {kind: words.split() for kind, words in NAMES[file].items()}
        rows = [row for label in CLASSES for row in _of(label, count, names, dice, seen)]
        dice.shuffle(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / file).write_text(text, encoding="utf-8")
        print(file, dict(Counter(row["label"] for row in rows)))


def _of(
    label: str, count: int, names: dict[str, list[str]], dice: random.Random, seen: set[str]
) -> list[dict[str, str]]:
    """`count` lines of that class, none of which stands in `seen`."""
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        text = _line(label, names, dice)
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": label})
    return rows


def _line(label: str, names: dict[str, list[str]], dice: random.Random) -> str:
    """One part of the class, and none to two of less grave ones, in any order."""
    lesser = CLASSES[: CLASSES.index(label) + 1]
    kinds = [label, *(dice.choice(lesser) for _ in range(dice.choice((0, 0, 1, 1, 2))))]
    dice.shuffle(kinds)
    parts = [_filled(dice.choice(PARTS[kind]), names, dice) for kind in kinds]
    # Behind a comment nothing runs; what a part's own && or || decides must not reach its neighbours.
    parts.sort(key=lambda part: (part.startswith("#"), part.endswith("&"), "&& " in part or "|| " in part))
    line = parts[0]
    for before, part in pairwise(parts):
        apart = part.startswith("#") or any(sign in before + part for sign in ("&& ", "|| "))
        line += (" " if before.endswith("&") else "; " if apart else dice.choice(JOINS)) + part
    return line


def _filled(part: str, names: dict[str, list[str]], dice: random.Random) -> str:
    """`part` with names; each place its own."""
    part = part.replace("{harm}", dice.choice(HARMS))
    while "{" in part.replace("{{", "").replace("}}", ""):
        for kind, words in names.items():
            if f"{{{kind}}}" in part:
                part = part.replace(f"{{{kind}}}", dice.choice(words), 1)
                break
        else:
            break
    return part.replace("{{", "{").replace("}}", "}")


if __name__ == "__main__":
    main()
