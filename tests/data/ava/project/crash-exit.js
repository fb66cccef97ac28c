// process.exit() in a test: AVA's TAP reporter dies of it (avajs/ava#3461).
import process from 'node:process';
import test from 'ava';

test.serial('done before', t => t.pass());
test.serial('exits', () => {
	process.exit(3);
});
test.serial('never starts', t => t.pass());
