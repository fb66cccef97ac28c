// An error outside any test: the tests that run are lost to it.
import test from 'ava';

test.serial('done before', t => t.pass());
test.serial('never ends', () => new Promise(() => {
	setTimeout(() => {
		throw new RangeError('out of nowhere');
	}, 100);
}));
test.serial('never starts', t => t.pass());
