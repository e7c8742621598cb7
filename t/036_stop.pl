# sb_stop() at bad moments: whoever keeps the handler from its work, or waits
# for the buffer, is about to count; it is cancelled at each of its steps; and
# sessions count all the time.  Nothing that was published before the buffer
# is stopped stays behind.  Then the procedures of doc/operations.md to alter
# and to drop a buffer that is in use.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(time);

my $db = 'postgres';
my $node = new_node('stop', q{shared_preload_libraries = 'statbuffer'}, q{deadlock_timeout = '100ms'},
	'max_prepared_transactions = 5');

sub look
{
	my ($name) = @_;

	return sql("SELECT state, pending, in_flight FROM sb_stat_buffers WHERE relid = '$name'::regclass");
}

# STOP_LOCK is had, and the drain under it waits.
my $stopping = q{EXISTS (SELECT FROM pg_locks s WHERE s.pid = a.pid AND s.granted
	AND s.mode = 'ShareRowExclusiveLock') AND NOT coalesce(a.wait_event_type = 'Lock', false)};

# --- the handler waits for someone who is about to count --------------------

sql(q{
	CREATE TABLE pages (path text PRIMARY KEY, title text, views bigint NOT NULL DEFAULT 0);
	INSERT INTO pages VALUES ('/home', 'Home'), ('/other', 'Other');
	CREATE FUNCTION store_views(p text, counter bigint) RETURNS void LANGUAGE sql AS
	'UPDATE pages SET views = views + counter WHERE path = p';
	CREATE FOREIGN TABLE views (path text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_views', interval '1h', timeout '1h', shutdown '6s');
	SELECT sb_increment('/home', 5, 'views'), sb_increment('/other', 5, 'views')});
my $editor = $node->background_psql($db);
$editor->query_safe(q{BEGIN; UPDATE pages SET title = 'At home' WHERE path = '/home'});
my $begun = time;
my $stop = start_session($node, $db, q{SELECT sb_stop('views')});
wait_for_session($stop, $stopping, 'sb_stop() keeps counters out, and the handler waits for a row');
$editor->query_safe(q{SELECT sb_increment('/home', 1, 'views'); COMMIT});
$editor->quit;
is(finish_session($stop, 'whose transaction can count all the same, and sb_stop() comes back'), '', 'without a word');
cmp_ok(time - $begun, '<', 6, 'before its time is up');
is(sql('SELECT string_agg(path || views, $$ $$ ORDER BY path) FROM pages'), '/home6 /other5', 'everything is stored');
is(look('views'), 'stopped|0|0', 'and nothing left');

# --- someone waits to alter it ----------------------------------------------

# While the handler waits at the gate, so does sb_stop(), and ALTER behind it;
# when the gate opens, the worker would have to wait behind ALTER.
make_buffer($node, $db, 'altered', q{interval '1h', timeout '1h', shutdown '60s', batch_size '1'});
sql(q{ALTER FUNCTION altered_store(text, bigint) SET deadlock_timeout = '1min';
	INSERT INTO altered SELECT 'k' || n FROM generate_series(1, 5) n});
my $counting = $node->background_psql($db);
$counting->query_safe(q{BEGIN; SELECT sb_increment('k', 100, 'altered')});
$stop = start_session($node, $db, q{SELECT sb_stop('altered')});
wait_for_session($stop, q{l.mode = 'ShareRowExclusiveLock'}, 'sb_stop() waits for an open increment');
my $gate = close_gate($node, $db);
$counting->query_safe('COMMIT');
$counting->quit;
wait_for($node, $db, q{SELECT in_flight > 0 FROM sb_stat_buffers WHERE buffer = 'altered'}, 'what it counted is with the handler');
my $alter = start_session($node, $db, q{ALTER FOREIGN TABLE altered OPTIONS (SET interval '2h')});
wait_for_session($alter, q{l.mode = 'AccessExclusiveLock'}, 'ALTER waits behind sb_stop()');
$begun = time;
open_gate($gate);
finish_session($alter, 'ALTER comes through');
is(finish_session($stop, 'and so does sb_stop()'), '', 'without a word');
cmp_ok(time - $begun, '<', 20, 'neither waits until the time is up');
is(look('altered'), 'stopped|0|0', 'nothing is left');
is(stored($node, $db, 'altered'), 105, 'everything is stored');
is(sql(q{SELECT ftoptions @> '{interval=2h,stopped=true}' FROM pg_foreign_table WHERE ftrelid = 'altered'::regclass}), 't',
	'both have had their way');

# --- two that have counted --------------------------------------------------

# They wait for each other: that is the detector's, and one of them goes on.
make_buffer($node, $db, 'pair', q{interval '1h', timeout '1h'});
my $log = -s $node->logfile;
my $other = $node->background_psql($db, on_error_stop => 0);
$other->query_safe(q{BEGIN; SELECT sb_increment('k', 1, 'pair')});
$stop = start_session($node, $db, q{BEGIN; SELECT sb_increment('k', 1, 'pair'); SELECT sb_stop('pair'); COMMIT});
wait_for_session($stop, q{l.mode = 'ShareRowExclusiveLock'}, 'a transaction that has counted waits to stop the buffer');
$other->query(q{SELECT sb_stop('pair')});
$other->query('COMMIT');
$other->quit;
$stop->{run}->finish;
is(lines_in_log($node, 'ERROR:  deadlock detected', $log), 1, 'two that wait for each other: one of them gets an error');
sql(q{SELECT sb_start('pair')});
sql(q{SELECT sb_drain('pair')});
is(stored($node, $db, 'pair'), 1, 'what the other one has counted is stored');

# --- it is rolled back ------------------------------------------------------

# The buffer's first worker waits for it, for longer than a tick of the
# schedule, and then finds two requests.  The key that one has made due is due
# for the other, too.
make_buffer($node, $db, 'kept_on', q{interval '1h', timeout '1h', shutdown '0'});
sql(q{SELECT sb_increment('k', 1, 'kept_on')});
my $stopping_session = $node->background_psql($db);
$stopping_session->query_safe(q{SET client_min_messages = warning; BEGIN; SELECT sb_stop('kept_on')});
sql(q{SELECT sb_flush('k', 'kept_on')});
wait_for($node, $db, q{
	SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
		WHERE backend_type = 'statbuffer worker' AND locktype = 'advisory' AND NOT granted)},
	'a worker comes up for sb_flush(), and waits');
my $drain = start_session($node, $db, q{SELECT sb_drain('kept_on')});
wait_for_session($drain, q{a.wait_event_type = 'Extension'}, 'sb_drain() waits');
$gate = close_gate($node, $db);
$stopping_session->query_safe('ROLLBACK');
$stopping_session->quit;
wait_at_gate($node, $db, 'after ROLLBACK, the handler is at work');
is(sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = '$drain->{name}'"), 1, 'and sb_drain() waits for it');
open_gate($gate);
finish_session($drain, 'sb_drain() returns');
is(stored($node, $db, 'kept_on'), 1, 'when everything is stored');

# --- it is cancelled --------------------------------------------------------

# At each of its steps.  Afterwards it is as if it had not been called.  The
# handler tries for the gate again and again, so that it cannot be cancelled.
sql(q{
	CREATE TABLE kept_calls (key text, counter bigint);
	CREATE FUNCTION kept_store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		LOOP
			BEGIN
				EXIT WHEN pg_try_advisory_xact_lock_shared(4713);
				PERFORM pg_sleep(0.02);
			EXCEPTION WHEN query_canceled THEN
				NULL;
			END;
		END LOOP;
		INSERT INTO kept_calls VALUES (key, counter);
	END $$;
	CREATE FOREIGN TABLE kept (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'kept_store', interval '1h', timeout '1h', shutdown '1d');
	SELECT sb_increment('k', 1, 'kept')});
my $counted = 1;
my $no_lock = q{NOT EXISTS (SELECT FROM pg_locks s WHERE s.pid = a.pid AND s.mode = 'ShareRowExclusiveLock')};

sub cancel_stop
{
	my ($session, $step) = @_;

	sql("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = '$session->{name}'");
	$session->{run}->finish;
	like($session->{err}, qr/canceling statement due to user request/, "$step: cancelled");
	is($session->{err} =~ /NOTICE/ ? 1 : 0, 0, "$step: nothing is told that is not so");
	sql(q{SELECT sb_increment('k', 1, 'kept')});
	$counted++;
	is(sql(q{SELECT state FROM sb_stat_buffers WHERE buffer = 'kept'}), 'running', "$step: it counts on");
	is(sql(q{SELECT count(*) FROM pg_locks WHERE mode IN ('ShareRowExclusiveLock', 'ExclusiveLock') AND relation = 'kept'::regclass}),
		0, "$step: no lock is left");
	return;
}

$gate = close_gate($node, $db);
$stop = start_session($node, $db, q{SELECT sb_stop('kept')});
wait_for($node, $db, q{SELECT in_flight = 1 FROM sb_stat_buffers WHERE buffer = 'kept'}, 'the handler is at work');
wait_for_session($stop, "$no_lock AND l.pid IS NULL", 'sb_stop() waits for it, without a lock');
cancel_stop($stop, 'in the first drain');
open_gate($gate);
sql(q{SELECT sb_drain('kept')});
is(stored($node, $db, 'kept'), $counted, 'in the first drain: all is stored');

$counting = $node->background_psql($db);
$counting->query_safe(q{BEGIN; SELECT sb_increment('k', 1, 'kept')});
$stop = start_session($node, $db, q{SELECT sb_stop('kept')});
wait_for_session($stop, q{l.mode = 'ShareRowExclusiveLock'}, 'sb_stop() waits for an open increment');
cancel_stop($stop, 'waiting for counters');
$counting->query_safe('COMMIT; BEGIN');
$counted++;
$counting->query_safe(q{SELECT sb_increment('k', 1, 'kept')});
$stop = start_session($node, $db, q{SELECT sb_stop('kept')});
wait_for_session($stop, q{l.mode = 'ShareRowExclusiveLock'}, 'sb_stop() waits for an open increment again');
$gate = close_gate($node, $db);
$counting->query_safe('COMMIT');
$counting->quit;
$counted++;
wait_for_session($stop, $stopping, 'it has kept counters out, and waits for the handler');
cancel_stop($stop, 'in the second drain');

# Its time is up at once, and the handler does not let itself be cancelled.
open_gate($gate);
sql(q{SELECT sb_drain('kept')});
$gate = close_gate($node, $db);
sql(q{ALTER FOREIGN TABLE kept OPTIONS (SET shutdown '20ms')});
sql(q{SELECT sb_increment('k', 1, 'kept'), sb_flush_all('kept')});
sql(q{SELECT sb_flush_all('kept')});
$counted++;
wait_for($node, $db, q{SELECT in_flight = 1 FROM sb_stat_buffers WHERE buffer = 'kept'}, 'the handler is at work again');
$stop = start_session($node, $db, q{SELECT sb_stop('kept')});
wait_for_session($stop, q{l.locktype = 'advisory'}, 'sb_stop() waits for the worker');
cancel_stop($stop, 'waiting for the worker');
my $calls = sql(q{SELECT handler_calls FROM sb_stat_buffers WHERE buffer = 'kept'});
open_gate($gate);
sql(q{SELECT sb_drain('kept')});
is(stored($node, $db, 'kept'), $counted, 'all is stored, each once');

# A transaction rolled back, with the worker at the gate: it goes on.
my $undone = $node->background_psql($db);
$undone->query_safe(q{BEGIN; SELECT sb_stop('kept')});
my $waiting = start_session($node, $db, q{SELECT sb_increment('k', 1, 'kept'), sb_flush_all('kept')}, q{SELECT sb_drain('kept')});
wait_for_session($waiting, q{l.mode = 'RowExclusiveLock'}, 'who counts waits for the transaction that stops');
$undone->query_safe('ROLLBACK');
$undone->quit;
finish_session($waiting, 'and counts when it is rolled back');
is(stored($node, $db, 'kept'), ++$counted, 'which is stored');

# --- under load -------------------------------------------------------------

# Sessions look, count, and note what they have counted, in one transaction
# each; when the buffer is stopped, they try again.
sql(q{
	CREATE TABLE notes (buffer text, key int, counter bigint);
	CREATE TABLE totals (buffer text, key bigint, total bigint, PRIMARY KEY (buffer, key));
	CREATE TABLE done (yes bool);
	CREATE FUNCTION add_total(name text, key bigint, counter bigint) RETURNS void LANGUAGE sql AS $$
		INSERT INTO totals VALUES (name, key, counter)
		ON CONFLICT ON CONSTRAINT totals_pkey DO UPDATE SET total = totals.total + EXCLUDED.total
	$$;
	CREATE PROCEDURE keep_counting(name text, looks bool) LANGUAGE plpgsql AS $$
	DECLARE
		k int;
	BEGIN
		LOOP
			EXIT WHEN EXISTS (SELECT FROM done);
			k := floor(random() * 20);
			BEGIN
				INSERT INTO notes VALUES (name, k, 1);
				IF looks THEN
					PERFORM sb_count(k, name::regclass);
				END IF;
				PERFORM sb_increment(k, 1, name::regclass);
				IF random() < 0.1 THEN
					PERFORM pg_sleep(0.02);
				END IF;
			EXCEPTION
				WHEN object_not_in_prerequisite_state THEN
					PERFORM pg_sleep(0.001);
				WHEN undefined_table THEN
					EXIT;
			END;
			COMMIT;
		END LOOP;
	END $$});

sub make_busy
{
	my ($name, $looks) = @_;

	sql(qq{
		TRUNCATE done;
		CREATE FUNCTION store_$name(key int, counter bigint) RETURNS void LANGUAGE sql AS
		\$\$ SELECT add_total('$name', key, counter) \$\$;
		CREATE FUNCTION store_$name(key bigint, counter bigint) RETURNS void LANGUAGE sql AS
		\$\$ SELECT add_total('$name', key, counter) \$\$;
		CREATE FOREIGN TABLE $name (key int NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'store_$name', interval '50ms', shutdown '60s')});
	return map { start_session($node, $db, "CALL keep_counting('$name', $looks)") } 1 .. 4;
}

sub noted { return sql("SELECT coalesce(sum(counter), 0) FROM notes WHERE buffer = '$_[0]'"); }
sub total { return sql("SELECT coalesce(sum(total), 0) FROM totals WHERE buffer = '$_[0]'"); }

# Waits until more is counted.
sub wait_for_more
{
	my ($name) = @_;
	my $noted = noted($name);

	return $node->poll_query_until($db, "SELECT sum(counter) > $noted + 200 FROM notes WHERE buffer = '$name'");
}

sub finish_load
{
	my ($what, @load) = @_;

	sql('INSERT INTO done VALUES (true)');
	my @errors = grep { $_ ne '' } map { finish_session($_, "$what: a session that counts") } @load;
	is("@errors", '', "$what: they had no other errors");
	return;
}

my @load = make_busy('busy', 'true');
my @left;
foreach my $round (1 .. 8)
{
	ok(wait_for_more('busy'), "round $round: sessions count") or last;
	my ($status, $out, $err) = $node->psql($db, q{SELECT sb_stop('busy')});
	is($status . $err, '0', "round $round: sb_stop() has nothing to tell");
	push @left, grep { $_ ne 'stopped|0|0' } look('busy');
	is(total('busy'), noted('busy'), "round $round: all that was counted is stored");
	sql(q{SELECT sb_start('busy')});
}
is("@left", '', 'and nothing was left');
finish_load('load', @load);
sql(q{SELECT sb_drain('busy')});
is(total('busy'), noted('busy'), 'all is stored in the end');

# --- the procedures ---------------------------------------------------------

# Key columns altered under load, in one transaction: those who count wait.
@load = make_busy('widened', 'false');
wait_for_more('widened');
foreach my $type ('bigint', 'int', 'bigint')
{
	my ($status, $out, $err) = $node->psql($db, qq{
			BEGIN;
			SELECT sb_stop('widened');
			ALTER FOREIGN TABLE widened ALTER key TYPE $type;
			SELECT sb_start('widened');
			COMMIT});
	is($status . $err, '0', "the key column is altered to $type under load, in one transaction");
	ok(wait_for_more('widened'), "$type: sessions go on counting");
}
finish_load('altered', @load);
sql(q{SELECT sb_drain('widened')});
is(total('widened'), noted('widened'), 'altered: nothing is stranded');
is(sql(q{SELECT state, last_error FROM sb_stat_buffers WHERE buffer = 'widened'}), 'running|', 'and nothing has failed');

# With sessions that look before they count, in a transaction for each step:
# those who count get errors meanwhile.
@load = make_busy('narrowed', 'true');
wait_for_more('narrowed');
foreach my $type ('bigint', 'int')
{
	is(sql(q{SELECT sb_stop('narrowed')}) . sql('SELECT count(*) FROM narrowed'), 't0', "$type: stopped, and nothing is left");
	sql("ALTER FOREIGN TABLE narrowed ALTER key TYPE $type");
	sql(q{SELECT sb_start('narrowed')});
	ok(wait_for_more('narrowed'), "$type: sessions go on counting");
}
finish_load('altered step by step', @load);
sql(q{SELECT sb_drain('narrowed')});
is(total('narrowed'), noted('narrowed'), 'altered step by step: nothing is stranded');

# Dropped under load, in two transactions: those who count get errors.
$log = -s $node->logfile;
@load = make_busy('gone', 'true');
wait_for_more('gone');
is($node->psql($db, q{SELECT sb_stop('gone')}), 0, 'stopped, to be dropped');
is(sql(q{SELECT count(*) FROM gone}), 0, 'nothing is left');
sql('DROP FOREIGN TABLE gone');
finish_load('dropped', @load);
is(total('gone'), noted('gone'), 'dropped: all that was counted is stored');
is(lines_in_log($node, 'dropped the counts of a buffer', $log), 0, 'dropped: the log tells of no counts that went with it');

# Stopped by hand nothing is flushed; sb_start() and sb_stop() make up for it.
make_buffer($node, $db, 'by_hand', q{interval '1h'});
sql(q{SELECT sb_increment('k', 3, 'by_hand'); ALTER FOREIGN TABLE by_hand OPTIONS (ADD stopped 'true')});
is(sql(q{SELECT state, pending FROM sb_stat_buffers WHERE buffer = 'by_hand'}), 'stopped|3', 'stopped by hand, it holds what it held');
sql(q{BEGIN; SELECT sb_start('by_hand'); SELECT sb_stop('by_hand'); COMMIT});
sql(q{SELECT sb_start('by_hand'); SELECT sb_stop('by_hand')});
is(look('by_hand'), 'stopped|0|0', 'started and stopped, it does not');
is(stored($node, $db, 'by_hand'), 3, 'it is stored');

# A start that is prepared: a worker that comes before it is committed must not
# take the buffer for one that stays stopped.
make_buffer($node, $db, 'prepared', q{interval '1h'});
increment($node, $db, 'prepared', 'k', 3);
sql(q{ALTER FOREIGN TABLE prepared OPTIONS (ADD shutdown '0'); SELECT sb_stop('prepared')});
sql(q{BEGIN; SELECT sb_start('prepared'); PREPARE TRANSACTION 'start'});
wait_for($node, $db, q{
		SELECT count(*) = 1 FROM pg_locks l JOIN pg_stat_activity USING (pid)
		WHERE backend_type = 'statbuffer worker' AND NOT granted}, 'a worker waits for the start');
sql(q{COMMIT PREPARED 'start'});
is(sql(qq{SELECT sb_drain('prepared', '$patience')}), 't', 'when it is committed, the buffer is flushed');
is(sql('SELECT sum(counter) FROM prepared_calls'), 3, 'all of it');

# Workers are terminated while they wait to look at a buffer that was started: the
# next one looks, and what the buffer holds is flushed.
make_buffer($node, $db, 'terminated', q{interval '100ms', timeout '1s', shutdown '0'});
sql(q{ALTER FOREIGN TABLE terminated OPTIONS (SET interval '1h')});
increment($node, $db, 'terminated', 'k', 3);
sql(q{SELECT sb_stop('terminated')});
sql(q{ALTER FOREIGN TABLE terminated OPTIONS (SET interval '100ms')});
wait_for($node, $db, q{SELECT pid IS NULL FROM sb_stat_buffers WHERE buffer = 'terminated'},
	'terminated: no worker is there');
my $closed = close_gate($node, $db);
my $starter = $node->background_psql($db);
$starter->query_safe(q{BEGIN; SELECT sb_start('terminated')});
my $altering = start_session($node, $db,
	q{BEGIN; ALTER FOREIGN TABLE terminated OPTIONS (ADD jitter '0'); SELECT pg_advisory_xact_lock(4713); ROLLBACK});
wait_for_session($altering, q{a.wait_event = 'relation'}, 'terminated: somebody is about to alter it');
$starter->query_safe('COMMIT');
$starter->quit;
my $at_lock = q{FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND wait_event = 'relation'};
foreach my $time (1, 2)
{
	wait_for($node, $db, "SELECT count(*) = 1 $at_lock", "terminated: worker $time waits to look at it");
	my $pid = sql("SELECT pid $at_lock");
	sql("SELECT pg_terminate_backend($pid)");
	wait_for($node, $db, "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $pid", 'terminated: and is gone');
}
open_gate($closed);
finish_session($altering, 'terminated: it was not altered');
wait_for_stored($node, $db, 'terminated', 3, 'terminated: what it holds is flushed');

# A request that comes when a buffer is just being stopped stays open.  The
# launcher must not start workers for it again and again.
make_buffer($node, $db, 'asked', q{interval '100ms', timeout '1h', shutdown '0'});
increment($node, $db, 'asked', 'idle');
wait_for_stored($node, $db, 'asked', 1, 'asked: an idle key is held');
my $stopper = $node->background_psql($db);
$stopper->query_safe(q{BEGIN; SELECT sb_stop('asked')});
sql(q{SELECT sb_flush('idle', 'asked')});
$node->append_conf('postgresql.conf', q{log_min_messages = debug1});
$node->reload;
my $stopped_at = -s $node->logfile;
$stopper->query_safe('COMMIT');
$stopper->quit;
wait_for($node, $db, q{SELECT state = 'stopped' AND pid IS NULL FROM sb_stat_buffers WHERE buffer = 'asked'}, 'asked: it is stopped');

# other work that takes its while
foreach my $round (1 .. 20)
{
	increment($node, $db, 'terminated', "k$round");
	sql(qq{SELECT sb_drain('terminated', '$patience')});
}
my $relid = sql(q{SELECT 'asked'::regclass::oid});
cmp_ok(lines_in_log($node, qq{starting background worker process "statbuffer worker for buffer $relid }, $stopped_at), '<=', 2,
	'asked: no worker is started for it again and again');

$node->stop;
done_testing();
