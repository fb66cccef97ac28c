// A rejection that nobody handles.
import test from 'ava';

test('leaves a rejection behind', t => {
	Promise.reject(new Error('nobody cares'));
	t.pass();
});
