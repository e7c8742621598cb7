# A session that speaks the protocol itself, for the fuzz test.
#
# psql would do for queries; but calls also come by the extended protocol, with
# parameters in binary, and by the function call message, and what the server
# answers has to be known statement by statement without a process for each.
# Sessions do not block, so that one loop can have several at work.

package FuzzSession;

use strict;
use warnings;

use Exporter 'import';
use IO::Handle;
use IO::Select;
use PostgreSQL::Test::Utils;
use Time::HiRes qw(time usleep);

our @EXPORT_OK = qw(simple extended fast_path copy_in);

#
# Messages: what is sent, how to show it to people, and the data if it is a COPY
#

sub message
{
	my ($type, $body) = @_;

	return pack('a1 N', $type, length($body) + 4) . $body;
}

# A query as psql would send it
sub simple
{
	my ($query) = @_;

	return { bytes => message('Q', "$query\0"), text => $query };
}

sub copy_in
{
	my ($query, $data) = @_;

	return { %{ simple($query) }, copy => $data };
}

# A query with parameters: a list of [type OID, format, bytes or undef].  `rows'
# are fetched at a time; 0 for all.
sub extended
{
	my ($query, $rows, @parameters) = @_;
	my $parse = "\0$query\0" . pack('n N*', scalar @parameters, map { $_->[0] } @parameters);
	my $bind = "\0\0" . pack('n n*', scalar @parameters, map { $_->[1] } @parameters)
	  . pack('n', scalar @parameters);

	$bind .= defined $_->[2] ? pack('N/a*', $_->[2]) : pack('N', 0xffffffff)
	  foreach @parameters;
	$bind .= pack('n', 0);
	return {
		bytes => message('P', $parse)
		  . message('B', $bind)
		  . message('D', "P\0")
		  . message('E', "\0" . pack('N', $rows)) x ($rows > 0 ? 3 : 1)
		  . message('S', ''),
		text => "$query -- "
		  . join(', ', map { "$_->[0]:$_->[1]:" . (defined $_->[2] ? unpack('H*', $_->[2]) : 'null') } @parameters)
	};
}

# A call of a function by its OID: arguments as [format, bytes or undef]
sub fast_path
{
	my ($oid, @arguments) = @_;
	my $body = pack('N n n* n', $oid, scalar @arguments, (map { $_->[0] } @arguments), scalar @arguments);

	$body .= defined $_->[1] ? pack('N/a*', $_->[1]) : pack('N', 0xffffffff)
	  foreach @arguments;
	$body .= pack('n', 0);
	return {
		bytes => message('F', $body),
		text => "function $oid by the function call message"
	};
}

#
# Sessions
#

# Connects; dies when that cannot be done for long.  The parameters are those
# of the protocol: application_name, options and so on.
sub new
{
	my ($class, $node, $database, %parameters) = @_;
	my $self = bless {
		node => $node,
		database => $database,
		parameters => \%parameters,
		errors => {},
		lost => 0
	}, $class;

	$self->connect;
	return $self;
}

sub connect
{
	my ($self) = @_;
	my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;
	my $parameters = join("\0",
		user => $ENV{PGUSER} // scalar getpwuid($>),
		database => $self->{database},
		%{ $self->{parameters} },
		'', '');

	for (;;)
	{
		my $socket = eval { $self->{node}->raw_connect };

		$self->{input} = '';
		$self->{socket} = $socket;
		$self->{status} = undef;
		$self->{message} = { text => 'connecting' };
		$self->{since} = time;
		if ($socket)
		{
			$self->write(pack('N N', length($parameters) + 8, 196608) . $parameters);
			$self->wait;
			return if defined $self->{status};
		}
		die "the server is gone\n" if !-e $self->{node}->data_dir . '/postmaster.pid';
		die "cannot connect to $self->{database}: " . ($self->{error} // "") . "\n" if time > $deadline;
		usleep(100_000);
	}
}

sub write
{
	my ($self, $bytes) = @_;

	local $SIG{PIPE} = 'IGNORE';
	$self->{socket}->blocking(1);
	while (length $bytes)
	{
		my $n = syswrite $self->{socket}, $bytes;

		return if !defined $n;    # reading will tell
		substr($bytes, 0, $n, '');
	}
}

# Sends a message.  The answer is complete when is_idle().
sub send
{
	my ($self, $message) = @_;

	$self->{message} = $message;
	$self->{since} = time;
	$self->{status} = undef;
	$self->{rows} = [];
	$self->{error} = undef;
	$self->write($message->{bytes});
}

sub is_idle { return defined $_[0]{status}; }

sub in_transaction { return ($_[0]{status} // 'I') ne 'I'; }

# Takes in what has come.  Returns false when the connection is lost.
sub receive
{
	my ($self) = @_;

	$self->{socket}->blocking(0);
	my $n = sysread $self->{socket}, $self->{input}, 65536, length $self->{input};
	if (!defined $n)
	{
		return 1 if $!{EAGAIN} || $!{EWOULDBLOCK} || $!{EINTR};
		$n = 0;
	}
	if ($n == 0)
	{
		$self->{lost}++;
		CORE::close $self->{socket};
		$self->{socket} = undef;
		return 0;
	}

	while (length $self->{input} >= 5)
	{
		my ($type, $length) = unpack 'a1 N', $self->{input};

		last if length $self->{input} < $length + 1;
		my $body = substr $self->{input}, 5, $length - 4;
		substr($self->{input}, 0, $length + 1, '');
		$self->take($type, $body);
	}
	return 1;
}

sub take
{
	my ($self, $type, $body) = @_;

	if ($type eq 'E')
	{
		my %field = map { /^(.)(.*)$/s ? ($1 => $2) : () } split /\0/, $body;

		$self->{error} = "$field{C}: $field{M}";
		$self->{errors}{ $field{C} }++;
	}
	elsif ($type eq 'D' && ($self->{message}{keep} || defined $self->{message}{expect}))
	{
		my ($columns, @row) = unpack 'n', $body;
		my $at = 2;

		foreach (1 .. $columns)
		{
			my $length = unpack 'l>', substr $body, $at, 4;

			push @row, $length < 0 ? undef : substr($body, $at + 4, $length);
			$at += 4 + ($length < 0 ? 0 : $length);
		}
		push @{ $self->{rows} }, \@row;
	}
	elsif ($type eq 'G')
	{
		my $data = $self->{message}{copy};

		$self->write(defined $data ? message('d', $data) . message('c', '') : message('f', "no data\0"));
	}
	elsif ($type eq 'Z')
	{
		$self->{status} = $body;
	}
	elsif ($type eq 'R' && unpack('N', $body) != 0)
	{
		die "the server wants a password\n";
	}
}

# Waits for the answer.  False when the connection is lost instead; dies when
# neither happens for long.
sub wait
{
	my ($self) = @_;
	my $select = IO::Select->new($self->{socket});

	while (!$self->is_idle)
	{
		die "no answer to: $self->{message}{text}\n"
		  if time > $self->{since} + $PostgreSQL::Test::Utils::timeout_default;
		return 0 if $select->can_read(1) && !$self->receive;
	}
	return 1;
}

# Runs a query and waits; returns its rows, or dies of its error.
sub query
{
	my ($self, $query) = @_;

	$self->send({ %{ simple($query) }, keep => 1 });
	$self->wait or die "connection lost in: $query\n";
	die "$self->{error} in: $query\n" if defined $self->{error};
	return @{ $self->{rows} };
}

# The first column of the first row
sub value { return ($_[0]->query($_[1]))[0][0]; }

# Runs a query that may fail; returns its error, or undef.
sub attempt
{
	my ($self, $query) = @_;

	return eval { $self->query($query); 1 } ? undef : $@;
}

sub close
{
	my ($self) = @_;

	return if !$self->{socket};
	$self->write(message('X', ''));
	CORE::close $self->{socket};
	$self->{socket} = undef;
}

1;
