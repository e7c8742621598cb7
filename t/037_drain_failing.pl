# A session that drains a buffer is told why that takes so long: once of each
# failure, with the time of the next attempt.  The same in the error of one that
# is cancelled.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IPC::Run;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('main');

sql(q{
	CREATE TABLE reason (message text, detail text, hint text);
	INSERT INTO reason VALUES ('no', '', '');
	CREATE TABLE stored (key text, counter bigint);
	CREATE FUNCTION failing_store(p_key text, p_counter bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		IF (SELECT message FROM reason) <> '' THEN
			RAISE '%', (SELECT message FROM reason)
				USING DETAIL = (SELECT detail FROM reason), HINT = (SELECT hint FROM reason);
		END IF;
		INSERT INTO stored VALUES (p_key, p_counter);
	END $$;
	CREATE FOREIGN TABLE failing (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'failing_store', interval '1h', timeout '1h', backoff '100ms');
	INSERT INTO failing VALUES ('k')});

# wait_for_output(SESSION, PATTERN, WHAT): waits until it has printed that.
sub wait_for_output
{
	my ($session, $pattern, $what) = @_;

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		$session->{run}->pump_nb;
		last if $session->{err} =~ $pattern;
		select undef, undef, undef, 0.1;
	}
	like($session->{err}, $pattern, $what);
	return;
}

my $failures = q{FROM sb_stat_buffers WHERE buffer = 'failing'};
my $next = qr/DETAIL:  The next attempt is at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+/;

# --- the same again, and another one ----------------------------------------

my $session = start_session($node, $db, q{SELECT sb_drain('failing')});
wait_for_output($session, qr/WARNING:  could not flush buffer "failing": no\n$next/, 'a failure is told');
my $seen = sql("SELECT failures $failures");
wait_for($node, $db, "SELECT failures > $seen + 3 $failures", 'it fails again and again');
sql(q{UPDATE reason SET message = 'still no', detail = 'It is early.', hint = 'Wait.'});
wait_for_output($session, qr/WARNING:  could not flush buffer "failing": still no\nDETAIL:  It is early\.\nThe next attempt is at \S+ \S+\nHINT:  Wait\.\n/,
	'another one is told, with its detail and its hint');
sql(q{UPDATE reason SET message = ''});
finish_session($session, 'the drain ends when the handler works');
is($session->{out}, "t\n", 'and is true');
is(() = $session->{err} =~ /WARNING/g, 2, 'each was told once');
is(sql('SELECT key, counter FROM stored'), 'k|1', 'the count is stored');

# --- no further attempt -----------------------------------------------------

sql(q{
	UPDATE reason SET message = 'no';
	ALTER FOREIGN TABLE failing OPTIONS (ADD restart 'temporary');
	INSERT INTO failing VALUES ('k')});
$session = start_session($node, $db, q{SELECT sb_drain('failing')});
finish_session($session, 'a drain ends when the count is discarded');
is(sql("SELECT discarded $failures"), '1', 'which the statistics tell');
sql(q{ALTER FOREIGN TABLE failing OPTIONS (DROP restart)});

# --- the buffer itself fails ------------------------------------------------

sql(q{
	INSERT INTO failing VALUES ('k');
	ALTER FOREIGN TABLE failing OPTIONS (SET handler 'no_such_function')});
my (undef, $out, $err) = $node->psql($db, q{SELECT sb_drain('failing', '3s')});
is($out, 'f', 'the time is up');
like($err, qr/WARNING:  could not flush buffer "failing": handler function no_such_function\(text, bigint\) does not exist\n$next\S*\nHINT:  Create it/,
	'that there is no handler is told, too');
like(sql("SELECT last_error $failures"),
	qr/^handler function no_such_function\(text, bigint\) does not exist\nHINT:  Create it, .*owner's search path\.$/,
	'the view has the hint, too');
sql(q{ALTER FOREIGN TABLE failing OPTIONS (SET handler 'failing_store')});

# --- cancelled --------------------------------------------------------------

$session = start_session($node, $db, q{SELECT sb_drain('failing')});
wait_for_output($session, qr/WARNING:  could not flush buffer "failing": no\n/, 'a failure is told to a session');
sql(qq{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = '$session->{name}'});
ok(!$session->{run}->finish, 'which is cancelled');
like($session->{err}, qr/ERROR:  canceling statement due to user request\nCONTEXT:  while waiting for buffer "failing", which could not be flushed: no\n/,
	'the error has it as its context');

# One that is cancelled before anything has failed.
sql(q{UPDATE reason SET message = ''; SELECT sb_drain('failing')});
make_buffer($node, $db, 'slow', q{interval '1h', timeout '1h'});
my $gate = close_gate($node, $db);
increment($node, $db, 'slow', 'a');
(undef, undef, $err) = $node->psql($db, q{SET statement_timeout = '1s'; SELECT sb_drain('slow')});
like($err, qr/ERROR:  canceling statement due to statement timeout\nCONTEXT:  while waiting for buffer "slow" to be flushed/,
	'without a failure, only what it waits for');
open_gate($gate);

# --- the session's own increments -------------------------------------------

(undef, undef, $err) = $node->psql($db, q{BEGIN; INSERT INTO slow VALUES ('a', 5), ('b', 6); SELECT sb_drain('slow')});
like($err, qr/WARNING:  increments of this transaction are not drained\nDETAIL:  It has counted 11 in 2 keys of buffer "slow"/,
	'a warning of what the transaction itself has counted');

$node->stop;
done_testing();
