// For --fail-fast.
import test from 'ava';

test.serial('fails', t => t.fail());
for (let i = 0; i < 15; i++) {
	test.serial(`later ${i}`, t => t.pass());
}
