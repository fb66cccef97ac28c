// What is thrown outside a test and is no error.
import test from 'ava';

test('never ends', () => new Promise(() => {
	setTimeout(() => {
		throw 'a string'; // eslint-disable-line no-throw-literal
	}, 50);
}));
