"""The sample's product: keeps passwords as salted hashes."""

import hashlib
import hmac
import os


class PasswordStore:
    """User names and the hashes of their passwords."""

    def __init__(self):
        self._users = {}

    def set(self, user, password):
        """Give a user a password of at least 8 characters."""
        if len(password) < 8:
            raise ValueError("a password has at least 8 characters")
        salt = os.urandom(16)
        self._users[user] = salt, _hash(password, salt)

    def check(self, user, password):
        """Whether this is the user's password."""
        if user not in self._users:
            return False
        salt, known = self._users[user]
        return hmac.compare_digest(known, _hash(password, salt))


def _hash(password, salt):
    return hashlib.scrypt(password.encode(), salt=salt, n=1024, r=8, p=1)
