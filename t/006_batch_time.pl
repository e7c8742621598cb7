# A batch that takes long is cut short, or has fewer keys the next time: what
# is stored by then is stored for good, the rest comes next, and nobody waits
# for all of it.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('slow', 'statbuffer.max_workers = 12', q{shared_preload_libraries = 'statbuffer'});

# What handlers store, and in which transaction and call; how long they take;
# and which keys they take offence at, at once or at the commit.
my $definitions = q{
	CREATE SEQUENCE call;
	CREATE TABLE calls (buffer text, key text, counter bigint,
		xact xid8 DEFAULT pg_current_xact_id(), call bigint DEFAULT currval('call'));
	CREATE TABLE pace (buffer text, fixed float8, per_key float8);
	CREATE TABLE bad (key text);

	CREATE FUNCTION take_time(name text, keys int) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_sleep(fixed + per_key * keys) FROM pace WHERE buffer = name;
	END $$;

	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF EXISTS (SELECT FROM bad WHERE key = NEW.key) THEN
			RAISE 'bad key at the commit';
		END IF;
		RETURN NULL;
	END $$;
	CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON calls DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION refuse();
};

# make_slow(NAME, FORM, OPTIONS[, TYPE]): a buffer whose handler takes one key
# a call, or arrays.
sub make_slow
{
	my ($name, $form, $options, $type) = @_;

	$type //= 'text';
	sql($form eq 'arrays' ? qq{
		CREATE FUNCTION ${name}_store(keys $type\[], counters bigint[]) RETURNS void
		LANGUAGE plpgsql AS \$\$
		BEGIN
			PERFORM nextval('call');
			INSERT INTO calls SELECT '$name', k, c FROM unnest(keys, counters) AS u (k, c);
			PERFORM take_time('$name', cardinality(keys));
		END \$\$;
	} : qq{
		CREATE FUNCTION ${name}_store(key $type, counter bigint) RETURNS void
		LANGUAGE plpgsql AS \$\$
		BEGIN
			IF key::text = 'gate' THEN
				PERFORM pg_advisory_xact_lock_shared(4713);
			ELSIF key::text = 'worst' THEN
				RAISE 'bad key';
			END IF;
			PERFORM nextval('call');
			INSERT INTO calls VALUES ('$name', key, counter);
			PERFORM take_time('$name', 1);
		END \$\$;
	});
	sql(qq{
		CREATE FOREIGN TABLE $name (key $type NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler '${name}_store', interval '1h', timeout '1h', backoff '1h'}
		. ($options ? ", $options" : '') . ')');
	return;
}

# takes(NAME, FIXED, PER_KEY): how many seconds the buffer's handler takes from
# here on, for a call and for each of its keys.
sub takes
{
	my ($name, $fixed, $per_key) = @_;

	sql("DELETE FROM pace WHERE buffer = '$name'; INSERT INTO pace VALUES ('$name', $fixed, $per_key)");
	return;
}

# What is stored for a buffer: rows, keys, their sum, and in how many
# transactions.
sub is_stored
{
	my ($name, $expected, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(sql(qq{
			SELECT count(*), count(DISTINCT key), coalesce(sum(counter), 0), count(DISTINCT xact)
			FROM calls WHERE buffer = '$name'}),
		$expected, $what);
	return;
}

# What the view says of a buffer.
sub is_told
{
	my ($name, $expected, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(sql(qq{
			SELECT handler_calls, flushed_keys, flushed_count, failures, discarded, pending, in_flight
			FROM sb_stat_buffers WHERE relid = '$name'::regclass}),
		$expected, $what);
	return;
}

use_node($node, $db);
sql($definitions);

# --- one key a call ---------------------------------------------------------

# Each call takes longer than a batch may: so each is a batch.  No key is handed
# over twice.
make_slow('hits', 'one key', q{batch_time '1ms'});
takes('hits', 0, 0.02);
sql(q{INSERT INTO hits SELECT 'k' || i, i FROM generate_series(1, 12) i});
is(sql(q{SELECT sb_drain('hits')}), 't', 'a drain comes to its end');
is_stored('hits', '12|12|78|12', 'each key is stored, in a transaction of its own');
is_told('hits', '12|12|78|0|0|0|0', 'the view tells the same');

# Without a bound, or within it, they share a transaction.
for my $batch_time (qw(0 1h))
{
	sql(qq{TRUNCATE calls; ALTER FOREIGN TABLE hits OPTIONS (SET batch_time '$batch_time', ADD batch_size '12')});

	# what was learnt when there was a bound is forgotten step by step
	for (1 .. 10)
	{
		sql(q{TRUNCATE calls; INSERT INTO hits SELECT 'k' || i, i FROM generate_series(1, 12) i});
		is(sql(q{SELECT sb_drain('hits')}), 't', "batch_time $batch_time: drained");
		last if $batch_time eq '0' || sql('SELECT count(DISTINCT xact) FROM calls') eq '1';
	}
	is_stored('hits', '12|12|78|1', "batch_time $batch_time: all keys are stored in one transaction");
	sql(q{ALTER FOREIGN TABLE hits OPTIONS (SET batch_time '1ms', DROP batch_size)});
}

# While a call is under way, what was stored before is there, one count is in
# flight, and the others are held as if nobody had touched them.
make_slow('gated', 'one key', q{batch_time '1ms'});
takes('gated', 0, 0.02);
my $gate = close_gate($node, $db);
sql(q{INSERT INTO gated SELECT 'a' || i, 10 FROM generate_series(1, 6) i});
sql(q{INSERT INTO gated VALUES ('gate', 1000)});
sql(q{INSERT INTO gated SELECT 'z' || i, 10 FROM generate_series(1, 6) i});
my $drain = start_session($node, $db, q{DO 'BEGIN ASSERT sb_drain(''gated''); END'});
wait_at_gate($node, $db, 'a call waits');
is(sql(q{SELECT count(*) > 0 FROM calls WHERE buffer = 'gated'}), 't', 'something is stored by then');
is(sql(q{
		SELECT in_flight, pending + in_flight + (SELECT sum(counter) FROM calls WHERE buffer = 'gated')
		FROM sb_stat_buffers WHERE buffer = 'gated'}),
	'1000|1120', 'one count is in flight, and none is missing');
is(sql(q{SELECT count(*) FROM sb_keys('gated') k JOIN calls USING (key) WHERE buffer = 'gated' AND k.count <> 0}),
	'0', 'what is stored is not held any more');

# Keys that are counted meanwhile come after these.
sql(q{INSERT INTO gated SELECT 'a' || i, 1 FROM generate_series(1, 6) i});
open_gate($gate);
is(finish_session($drain, 'the drain comes to its end'), '', 'without a word');
is(sql(q{SELECT sb_drain('gated')}), 't', 'so does another one');
is(sql(q{SELECT count(DISTINCT key), sum(counter), count(*) = count(DISTINCT xact) FROM calls WHERE buffer = 'gated'}),
	'13|1126|t', 'all is stored, one key a transaction');
is(sql(q{
		SELECT flushed_keys = handler_calls AND handler_calls = (SELECT count(*) FROM calls WHERE buffer = 'gated'),
			flushed_count, failures, pending, in_flight
		FROM sb_stat_buffers WHERE buffer = 'gated'}),
	't|1126|0|0|0', 'the view tells the same');

# Keys that their type calls equal are handed over as one, or left as one.
make_slow('merged', 'one key', q{batch_time '1ms'}, 'numeric');
takes('merged', 0, 0.02);
sql(q{INSERT INTO merged SELECT k, 10 FROM unnest('{1.0,1.00,2.0,2.00,2.000,3.0,3.00}'::numeric[]) k});
is(sql(q{SELECT sb_drain('merged')}), 't', 'equal keys: drained');
is(sql(q{SELECT key::numeric::int, sum(counter) FROM calls WHERE buffer = 'merged' GROUP BY 1 ORDER BY 1}),
	"1|20\n2|30\n3|20", 'equal keys: all are stored');
is(sql(q{SELECT counter FROM calls WHERE buffer = 'merged' ORDER BY call LIMIT 1}),
	'20', 'equal keys: the first call had both of its');
is(sql(q{SELECT flushed_keys, flushed_count, pending, in_flight FROM sb_stat_buffers WHERE buffer = 'merged'}),
	'7|70|0|0', 'equal keys: the view tells the same');

# --- a key that fails -------------------------------------------------------

# In its call, or when the transaction commits: it is found at once, because it
# is alone by then.  The keys that were left are not suspects.
for my $restart (qw(transient temporary))
{
	my ($failing, $discarded, $rest) = $restart eq 'transient' ? (1, 0, 100) : (0, 100, 0);

	for my $bad ('worst', 'a bad one')
	{
		my $how = "restart $restart, $bad";

		make_slow('failing', 'one key', qq{batch_time '1ms', restart '$restart'});
		takes('failing', 0, 0.02);
		sql(qq{
			TRUNCATE calls;
			INSERT INTO bad VALUES ('a bad one');
			INSERT INTO failing SELECT 'k' || i, 10 FROM generate_series(1, 8) i;
			INSERT INTO failing VALUES ('$bad', 100);
			SELECT sb_flush_all('failing')});
		wait_for($node, $db, q{SELECT count(*) = 8 FROM calls}, "$how: the others are stored");
		wait_for($node, $db, q{SELECT failures = 1 FROM sb_stat_buffers WHERE buffer = 'failing'}, "$how: it fails");
		is_stored('failing', '8|8|80|8', "$how: each once");
		is_told('failing', "9|8|80|1|$discarded|$rest|0", "$how: in one call each");
		is(sql(q{SELECT count(*) FROM sb_keys('failing') WHERE failures > 0}), $failing,
			"$how: it " . ($failing ? 'backs off' : 'is forgotten'));
		sql('TRUNCATE bad; DROP FOREIGN TABLE failing; DROP FUNCTION failing_store');
	}
}

# --- arrays -----------------------------------------------------------------

# most_keys(NAME): the largest number of keys in a call.
sub most_keys
{
	my ($name) = @_;

	return sql(qq{SELECT max(n) FROM (SELECT count(*) AS n FROM calls WHERE buffer = '$name' GROUP BY call) AS c});
}

# fill_and_drain(NAME, KEYS): which are all stored, once.
sub fill_and_drain
{
	my ($name, $keys) = @_;

	sql(qq{TRUNCATE calls; INSERT INTO $name SELECT 'k' || i, i FROM generate_series(1, $keys) i});
	is(sql(qq{SELECT sb_drain('$name')}), 't', "$name: drained");
	is(sql(qq{
			SELECT count(*), count(DISTINCT key), sum(counter), (SELECT pending + in_flight FROM sb_stat_buffers WHERE relid = '$name'::regclass)
			FROM calls WHERE buffer = '$name'}),
		join('|', $keys, $keys, $keys * ($keys + 1) / 2, 0), "$name: each key is stored once");
	return;
}

# reaches(NAME, KEYS, WHAT): after a few batches there is one of so many keys.
sub reaches
{
	my ($name, $keys, $what) = @_;
	my $most = 0;

	for (1 .. 20)
	{
		fill_and_drain($name, $keys);
		last if ($most = most_keys($name)) == $keys;
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($most, $keys, $what);
	return;
}

# The first batch takes ten times what it may.  So the next ones have fewer
# keys; and as many as ever when there is more time.
make_slow('packs', 'arrays', q{batch_time '100ms', batch_size '100'});
takes('packs', 0, 0.01);
fill_and_drain('packs', 100);
is(most_keys('packs'), 100, 'arrays: the first batch has as many keys as it may');
fill_and_drain('packs', 100);
cmp_ok(most_keys('packs'), '<', 100, 'arrays: it has taken too long, and the next ones have fewer');

# Another worker knows that, too.
sql(q{SELECT sb_stop('packs'); SELECT sb_start('packs')});
fill_and_drain('packs', 100);
cmp_ok(most_keys('packs'), '<', 100, 'arrays: so have those of another worker');
takes('packs', 0, 0);
sql(q{ALTER FOREIGN TABLE packs OPTIONS (SET batch_time '1h')});
reaches('packs', 100, 'arrays: when the handler has become quick, they grow again');

# Without a bound, they do at once.
takes('packs', 0, 0.01);
sql(q{ALTER FOREIGN TABLE packs OPTIONS (SET batch_time '10ms')});
fill_and_drain('packs', 100);
fill_and_drain('packs', 100);
cmp_ok(most_keys('packs'), '<', 100, 'arrays: fewer keys');
sql(q{ALTER FOREIGN TABLE packs OPTIONS (SET batch_time '0')});
fill_and_drain('packs', 100);
is(most_keys('packs'), 100, 'arrays: all keys when there is no bound');

# A handler that takes its time for a call, however many keys it has: smaller
# batches would only make it slower.
make_slow('remote', 'arrays', q{batch_time '20ms', batch_size '64'});
takes('remote', 0.03, 0);
fill_and_drain('remote', 1);
reaches('remote', 64, 'arrays: a handler whose time does not depend on the keys gets all of them');

# A key that fails among many is found in the usual way.
make_slow('suspects', 'arrays', q{batch_time '20ms', batch_size '16'});
takes('suspects', 0, 0.005);
fill_and_drain('suspects', 16);
sql(q{
	TRUNCATE calls;
	INSERT INTO bad VALUES ('k7');
	INSERT INTO suspects SELECT 'k' || i, 10 FROM generate_series(1, 16) i;
	SELECT sb_flush_all('suspects')});
wait_for($node, $db, q{SELECT count(*) = 15 FROM calls}, 'arrays: the others are stored');
wait_for($node, $db, q{SELECT failures = 1 FROM sb_stat_buffers WHERE buffer = 'suspects'}, 'arrays: one fails');
is(sql(q{SELECT count(*), count(DISTINCT key), sum(counter) FROM calls}), '15|15|150', 'arrays: each of the others once');
is(sql(q{SELECT key, count, failures FROM sb_keys('suspects') WHERE count > 0}), 'k7|10|1', 'arrays: the bad one is known');
sql('TRUNCATE bad');

# --- the end ----------------------------------------------------------------

# More than there is time for: what was stored remains so, and the rest is kept.
# A batch that may take longer than the stop is cut short before that.
for my $batch_time (qw(1ms 1h))
{
	my $name = "last_$batch_time";

	make_slow($name, 'one key', qq{batch_time '$batch_time', shutdown '6s'});
	takes($name, 0, 0.05);
	is(sql(qq{SELECT sb_start('$name'); INSERT INTO $name VALUES ('first'); SELECT sb_drain('$name')}) =~ s/^t\n//r, 't',
		"$batch_time: a worker is there");
	sql(qq{INSERT INTO $name SELECT 'k' || i, 10 FROM generate_series(1, 200) i});
}
$node->stop;
$node->start;
for my $batch_time (qw(1ms 1h))
{
	my $name = "last_$batch_time";

	cmp_ok(sql(qq{SELECT count(*) FROM calls WHERE buffer = '$name'}), '>', 1, "$batch_time: something was stored when the server stopped");
	takes($name, 0, 0);
	is(sql(qq{SELECT sb_drain('$name')}), 't', "$batch_time: the rest was saved");
	is(sql(qq{SELECT count(*), count(DISTINCT key), sum(counter) FROM calls WHERE buffer = '$name'}),
		'201|201|2001', "$batch_time: each key is stored once");
}

# The same with sb_stop().
make_slow('stopped', 'one key', q{batch_time '1ms', shutdown '1s'});
takes('stopped', 0, 0.05);
sql(q{INSERT INTO stopped SELECT 'k' || i, 10 FROM generate_series(1, 100) i});
my ($result, $stdout, $stderr) = $node->psql($db, q{SELECT sb_stop('stopped')});
like($stderr, qr/NOTICE:  not everything .* could be flushed/, 'sb_stop(): something is left');
is(sql(q{
		SELECT pending + (SELECT sum(counter) FROM calls WHERE buffer = 'stopped'), in_flight, failures
		FROM sb_stat_buffers WHERE buffer = 'stopped'}),
	'1000|0|0', 'sb_stop(): which is kept');
takes('stopped', 0, 0);
is(sql(q{SELECT sb_start('stopped'); SELECT sb_drain('stopped')}) =~ s/^t\n//r, 't', 'sb_stop(): and stored when it starts again');
is(sql(q{SELECT count(*), count(DISTINCT key), sum(counter) FROM calls WHERE buffer = 'stopped'}), '100|100|1000',
	'sb_stop(): each key once');
$node->stop;

# --- the neighbour ----------------------------------------------------------

# There is one worker.  A buffer has work for it that takes a while, all of it
# due, and another one a single key: that does not wait for all.
$node = new_node('neighbours', 'statbuffer.max_workers = 1');
use_node($node, $db);
sql($definitions);
make_slow('hog', 'one key', '');
takes('hog', 0, 0.05);
sql(q{
	CREATE TABLE seen (key text, counter bigint, stored bigint);
	CREATE FUNCTION modest_store(key text, counter bigint) RETURNS void LANGUAGE sql AS
	$$ INSERT INTO seen SELECT $1, $2, count(*) FROM calls $$;
	CREATE FOREIGN TABLE modest (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'modest_store', interval '0')});
$gate = close_gate($node, $db);
sql(q{
	INSERT INTO hog SELECT 'k' || i, 1 FROM generate_series(1, 199) i;
	INSERT INTO hog VALUES ('gate', 1);
	SELECT sb_flush_all('hog')});
wait_at_gate($node, $db, 'a buffer has got the only worker');
sql(q{INSERT INTO modest VALUES ('k', 7)});
$node->wait_for_log(qr/the workers take turns/);
open_gate($gate);
wait_for($node, $db, 'SELECT count(*) = 1 FROM seen', 'another one has its turn');
cmp_ok(sql('SELECT stored FROM seen'), '<', 200, 'before all of the first one is stored');
is(sql(q{SELECT sb_drain('hog')}), 't', 'which comes to its end');
is(sql('SELECT count(*), count(DISTINCT key), sum(counter), (SELECT sum(counter) FROM seen) FROM calls'), '200|200|200|7',
	'with all of both');
$node->stop;

done_testing();
