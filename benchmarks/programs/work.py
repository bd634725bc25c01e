"""The python3 row: calls, attributes, dictionaries, lists, strings and big integers."""


class Account:
    def __init__(self, name: str) -> None:
        self.name = name
        self.balance = 0

    def add(self, amount: int) -> int:
        self.balance += amount
        return self.balance


def words(count: int) -> list[str]:
    seed = 12345
    made = []
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) % 2147483648
        made.append(f"word{seed >> 16 & 1023}")
    return made


def main() -> None:
    counts: dict[str, int] = {}
    for word in words(60000):
        counts[word] = counts.get(word, 0) + 1
    accounts = [Account(name) for name in sorted(counts)]
    for account in accounts:
        for amount in range(50):
            account.add(counts[account.name] * amount)
    text = ",".join(f"{account.name}={account.balance}" for account in accounts)
    squares = sum([n * n for n in range(60000) if n % 3])
    power = pow(3, 3000) % (10**50 + 151)
    print(len(text), hash(squares), power, text.count("7"), max(text.split(","), key=len))


main()
