// One test hangs, with a handle that keeps its file alive.
import test from 'ava';

test.serial('done before', t => t.pass());
test.serial('hangs', () => new Promise(() => {
	setInterval(() => {}, 1000);
}));
test.serial('never starts', t => t.pass());
