# What the server's log must not have after random calls: crashes, internal
# errors, and warnings of what was left behind.

package FuzzLog;

use strict;
use warnings;

use Exporter 'import';
use FindBin;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT_OK = qw(check_log);

# Internal errors that are not ours: PostgreSQL itself has no better words for
# it when something it is working with is dropped or altered at the same time.
my @not_ours = (

	# definitions that are changed at the same time
	qr/tuple concurrently (updated|deleted)/,

	# a parameter was said to be of this type
	qr/cache lookup failed for type 4294967295/,

	# JOIN ... USING of columns whose types have nothing in common
	qr/failed to find conversion function from \S.* to \S.*\n.*LOCATION:  coerce_type,/,

	# a parameter in binary of random bytes
	qr/unsupported jsonb version number/,

	# who was to be terminated had gone
	qr/WARNING:  01000: PID \d+ is not a PostgreSQL/,

	# memberships that come and go
	qr/WARNING:  01000: role ".*" is not a member of role/,

	# what sb_drain() tells of the caller's own increments
	qr/WARNING:  01000: increments of this transaction are not drained/,

	# what it tells of failures
	qr/WARNING:  01000: could not flush buffer/,

	# and what ALTER tells of counts that have to wait
	qr/WARNING:  01000: buffer ".*" holds counts that do not fit its altered key columns/,

	# VACUUM and ANALYZE of foreign tables
	qr/WARNING:  01000: skipping "/);

# What is altered under PostgreSQL's own feet it has no better words for
# either, so there only what our sources report counts.
my $sources = join '|', map { m{([^/]+)$} } glob "$FindBin::RealBin/../../src/*.c";

# check_log(NODE, DDL): what a server's log tells, as three tests.
sub check_log
{
	my ($node, $ddl) = @_;
	my $log = slurp_file($node->logfile);
	my @crashes = $log =~ /^.*(?:PANIC:|TRAP:|was terminated by signal|all server processes terminated).*$/mg;
	my @internal;
	my @warnings;

	while ($log =~ /^\S+ \S+ \S+ \[(\d+)\] (.*?(ERROR|FATAL|WARNING|LOG):  (XX\w{3}|01000|58\w{3}): .*)\n((?:.*\n){0,12})/mg)
	{
		my ($pid, $message, $severity, $state, $more) = ($1, $2, $3, $4, $5);

		# what else the same process says of it
		my @lines = grep { /\[$pid\]/ || !/^\d{4}-/ } split /\n/, $more;
		my $text = join "\n", $message, @lines[ 0 .. ($#lines < 5 ? $#lines : 5) ];

		next if grep { $text =~ $_ } @not_ours;
		my ($reporter) = $text =~ /LOCATION:  \w+, ([^:]+):/;
		next if $ddl && $severity ne 'WARNING' && ($reporter // '') !~ /^(?:$sources)$/;
		push @{ $severity eq 'WARNING' ? \@warnings : \@internal }, $text;
	}
	is(scalar(@crashes), 0, 'no process crashes');
	diag($_) foreach @crashes;
	is(scalar(@internal), 0, 'no internal errors');
	is(scalar(@warnings), 0, 'no warnings of what was left behind');
	diag(substr $_, 0, 3000) foreach grep { defined } @internal[ 0 .. 9 ], @warnings[ 0 .. 9 ];
}

1;
