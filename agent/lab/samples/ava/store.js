import {randomBytes, scryptSync, timingSafeEqual} from 'node:crypto';

// The sample's product: keeps passwords as salted hashes.
export class PasswordStore {
	#users = new Map();

	set(user, password) {
		if (password.length < 8) {
			throw new RangeError('a password has at least 8 characters');
		}

		const salt = randomBytes(16);
		this.#users.set(user, {salt, hash: scryptSync(password, salt, 32)});
	}

	check(user, password) {
		const known = this.#users.get(user);
		return known !== undefined && timingSafeEqual(known.hash, scryptSync(password, known.salt, 32));
	}
}
